"""The names of benchmarks, the files of local ones, and keys of what they are made of. Imports no torch.

A task is named as in lm-eval, as in PyTorch's releases (`RELEASE13`), or by the path of a YAML file of lm-eval's form,
whose `data_files`, patterns among them, may be relative to it.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError

if TYPE_CHECKING:
    from quantize.tasks import Settings

PREFIX = "task:"
"""What names a benchmark where calibration data is named: `task:arc_easy`."""
RELEASE13: Mapping[str, str] = {
    "mmlu": "mmlu",
    "mmlu_pro": "mmlu_pro",
    "arc_challenge": "arc_challenge",
    "gpqa_main": "gpqa_main_zeroshot",
    "hellaswag": "hellaswag",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "siqa": "social_iqa",
    "truthfulqa_mc2": "truthfulqa_mc2",
    "winogrande": "winogrande",
    "mgsm_en_cot": "mgsm_en_cot_en",
    "gsm8k": "gsm8k",
    "mathqa": "mathqa",
}
"""The 13 tasks of the model cards of PyTorch's quantised releases (September 2025), and lm-eval's names of them."""

_HOME = Path(__file__).resolve().parent.parent
_ADVICE = {  # by what the hub's client and datasets say, in any of their chained errors
    r"is a gated dataset|GatedRepoError|Cannot access gated|403 Client|403 Forbidden": (
        "it is gated: ask for access on its page, then `hf auth login`"
    ),
    r"401 Client|401 Unauthorized": (
        "it does not exist or is not public: look at its page, ask for access there if it is gated, `hf auth login`"
    ),
    r"OfflineMode|offline mode|ConnectionError|ConnectTimeout|MaxRetryError|LocalEntryNotFound": (
        "its data is not in the local cache and the hub cannot be reached: run once with a network, and without "
        "HF_HUB_OFFLINE and HF_DATASETS_OFFLINE"
    ),
}


def expand(names: Sequence[str]) -> dict[str, str]:
    """What to load for each name that results are reported under, in order; `release13` is all of its tasks.

    Raises:
        UserError: a name is given twice.
    """
    found: dict[str, str] = {}
    for name in names:
        members = list(RELEASE13) if name == "release13" else [name]
        for member in members:
            shown = Path(member).stem if is_file(member) else member
            if shown in found:
                raise UserError(f"eval.tasks: {shown} is named twice")
            found[shown] = str(_find(member)) if is_file(member) else RELEASE13.get(member, member)
    return found


def is_file(name: str) -> bool:
    """Is that a local task (a YAML file), not a name?"""
    return name.endswith((".yaml", ".yml"))


def _find(name: str) -> Path:
    """A local task's file: as given, or among the packaged examples."""
    path, packaged = Path(name).expanduser(), _HOME / name
    return packaged if packaged.is_file() and not path.is_file() else path


def check_names(names: Sequence[str]) -> None:
    """Looks every name up, without loading data or torch.

    Raises:
        UserError: one line for each name that is no task.
    """
    expanded = expand(names)
    lines = [_no_file(spec) for spec in expanded.values() if is_file(spec) and not Path(spec).is_file()]
    registered = [spec for spec in expanded.values() if not is_file(spec)]
    known = open_manager(expanded).all_tasks if registered else []
    for spec in registered:
        if spec not in known:
            close = difflib.get_close_matches(spec, [*known, "release13"], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them."
            lines.append(f"eval.tasks: lm-eval has no task {spec}; {hint} A local task is named by its .yaml file.")
    if lines:
        raise UserError(*lines)


def _no_file(spec: str) -> str:
    looked = " or ".join(dict.fromkeys([str(Path(spec).absolute()), str(_HOME / spec)]))
    examples = sorted(str(found.relative_to(_HOME)) for found in (_HOME / "examples" / "tasks").glob("*.yaml"))
    packaged = f"; packaged are {', '.join(examples)}" if examples else ""
    return f"eval.tasks: there is no file {spec}, neither as given nor packaged (looked for: {looked}){packaged}"


def task_name(named: str | None) -> str | None:
    """The task that `task:NAME` names; None where the name is that of a file."""
    return named.removeprefix(PREFIX) if named is not None and named.startswith(PREFIX) else None


def fingerprint(tasks: Mapping[str, Mapping[str, Any]], settings: Settings) -> str:
    """Of all that decides the samples and their scoring: settings, task definitions, documents, lm-eval's version.

    Where local files lie is no part of it: a run may be finished on another machine.
    """
    digest = hashlib.sha256(_lm_eval_version().encode())
    asked = {key: value for key, value in asdict(settings).items() if key != "left_out"}  # what is left is looked at
    digest.update(json.dumps(asked | {"names": list(tasks)}).encode())
    for name, leaves in tasks.items():
        for leaf, task in leaves.items():
            definition = json.dumps([name, leaf, _without_folders(task.dump_config())], default=_plain, sort_keys=True)
            digest.update(re.sub("0x[0-9a-f]+", "", definition).encode())  # lm-eval writes some functions' addresses
            for number, document in enumerate(task.eval_docs):
                if settings.limit is not None and number >= settings.limit:
                    break
                digest.update(json.dumps(document, default=_plain, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def definition_key(names: Sequence[str]) -> str:
    """Of lm-eval's version, and of local tasks' files with what lies beside them; loads no task and runs no code.

    Raises:
        UserError: a task's file cannot be read.
    """
    digest = hashlib.sha256(_lm_eval_version().encode())
    for name, spec in expand(names).items():
        if not is_file(spec):
            continue
        path = Path(spec)
        files = {found for kind in ("*.yaml", "*.yml", "*.py") for found in path.parent.glob(kind)}
        try:
            files |= set(_paths((local_definition(path, code=False).get("dataset_kwargs") or {}).get("data_files")))
            for file in sorted(files):
                digest.update(file.name.encode() + (file.read_bytes() if file.is_file() else b""))
        except Exception as error:  # whatever YAML's reader raises
            raise unloadable(name, error) from error
    return digest.hexdigest()[:16]


def unloadable(name: str, error: BaseException) -> UserError:
    """What lm-eval or datasets says of a task, and what to do where its data is gated or the hub cannot be reached."""
    said, cause = "", error
    while True:  # datasets tells the reason in one of the errors below the last
        said += f"{type(cause).__name__} {cause}\n"
        below = cause.__cause__ or cause.__context__
        if below is None:
            break
        cause = below
    reason = " ".join(str(error).split()) or type(error).__name__
    advice = next((f"; {advice}" for pattern, advice in _ADVICE.items() if re.search(pattern, said)), "")
    return UserError(f"eval.tasks: {name} cannot be loaded: {reason[:400]}{advice}")


def require_lm_eval() -> None:
    """Raises UserError where lm-eval, an optional package, is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError(
            "eval.tasks: lm-eval is not installed; `make setup` installs it, or: pip install 'lm-eval>=0.4.13,<0.5'"
        )


def _lm_eval_version() -> str:
    from importlib.metadata import version

    require_lm_eval()
    return version("lm_eval")


def _without_folders(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A task's definition with its local files by name: what they hold is looked at by itself."""
    arguments = dict(definition.get("dataset_kwargs") or {})
    if "data_files" in arguments:
        arguments["data_files"] = [file.name for file in _paths(arguments["data_files"])]
    return {**definition, "dataset_kwargs": arguments}


def _paths(files: Any) -> Iterator[Path]:
    match files:
        case str():
            yield Path(files)
        case list() | dict():
            for file in files.values() if isinstance(files, dict) else files:
                yield from _paths(file)


def open_manager(expanded: Mapping[str, str]) -> Any:
    """lm-eval's index of tasks; its own thousands (five seconds) only where one of them is asked for."""
    import logging

    require_lm_eval()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not all(map(is_file, expanded.values())))


def local_definition(path: Path, *, code: bool = True) -> dict[str, Any]:
    """A local task's definition, with the files that lie beside it by their full paths; `code`: its functions, too."""
    from lm_eval.tasks._yaml_loader import load_yaml

    settings: dict[str, Any] = dict(load_yaml(path, resolve_func=code))
    if not isinstance(settings.get("task"), str):
        raise ValueError(f"{path} has no `task: NAME`; a group of local tasks is a list of their files")
    arguments = dict(settings.get("dataset_kwargs") or {})
    if "data_files" in arguments:
        settings["dataset_kwargs"] = arguments | {"data_files": _beside(path, arguments["data_files"])}
    return settings


def _beside(path: Path, files: Any) -> Any:
    match files:
        case str():
            found = path.parent / files
            return str(found.resolve()) if found.exists() else _matching(path.parent, files) or files
        case list():
            beside = [_beside(path, file) for file in files]
            return [file for each in beside for file in (each if isinstance(each, list) else [each])]
        case dict():
            return {key: _beside(path, file) for key, file in files.items()}
    return files


def _matching(folder: Path, pattern: str) -> list[str]:
    """The files that a pattern finds beside a task's YAML: datasets would look in the working directory."""
    if "::" in pattern or "://" in pattern or not glob.has_magic(pattern):
        return []
    found = (folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True))
    return sorted(str(file.resolve()) for file in found if file.is_file())


def _plain(value: Any) -> str:
    """For JSON: functions and other objects by name, never by address."""
    return str(getattr(value, "__name__", None) or type(value).__name__)
