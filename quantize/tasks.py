"""Benchmarks through lm-eval: which tasks a name stands for, and a model's result on every sample of them.

A task is named as in lm-eval, as in PyTorch's releases (`RELEASE13`), or by the path of a YAML file of lm-eval's form,
whose `data_files` may be relative to it. Nothing here aggregates: what is kept is one row a sample, so that arms can be
compared in pairs (`quantize.task_metrics`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantize.errors import UserError

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

_FILTER = "flexible-extract"  # where a task offers several: what the answer is, not how it is set
_LARGEST_BATCH = 64  # to begin with on CUDA; halved while memory does not suffice
_PER_UNIT = {
    "perplexity": "nats per answer",
    "word_perplexity": "nats per word",
    "byte_perplexity": "nats per byte",
    "bits_per_byte": "nats per byte",
}


@dataclass(frozen=True)
class Settings:
    """How tasks are run, under lm-eval's own names.

    Attributes:
        names: as the user wrote them.
        num_fewshot: examples in the prompt; None = what the task says.
        limit: the first so many samples of each task; None = all.
        chat_template: put prompts into the model's chat template.
        batch_size: rows at once; None = as many as fit, found by trying (CUDA), or 8 (CPU).
        seed: of the choice of few-shot examples.
    """

    names: Sequence[str]
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    batch_size: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One model's result on one sample of a task.

    Attributes:
        name: the task as the user named it; pools the subtasks of a group.
        task: lm-eval's name.
        doc_id: the sample's number in the task, `doc_hash` its content.
        metric: what `value` is; None where the task has no metric that is a number a sample.
        value: the metric, or nats where `weight` is not 1.
        weight: what the value is per: 1, or the words or bytes of a text.
        prompt, target, response: as text; of a choice, the response is the choice and its log-likelihood.
    """

    name: str
    task: str
    doc_id: int
    doc_hash: str
    metric: str | None
    value: float | None
    weight: float
    higher_is_better: bool
    prompt: str
    target: str
    response: str


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
    path, packaged = Path(name).expanduser(), Path(__file__).resolve().parent.parent / name
    return packaged if packaged.is_file() and not path.is_file() else path


def check_names(names: Sequence[str]) -> None:
    """Looks every name up, without loading data or torch.

    Raises:
        UserError: one line for each name that is no task.
    """
    expanded = expand(names)
    lines = [f"eval.tasks: no file {spec}" for spec in expanded.values() if is_file(spec) and not Path(spec).is_file()]
    registered = [spec for spec in expanded.values() if not is_file(spec)]
    known = _manager(expanded).all_tasks if registered else []
    for spec in registered:
        if spec not in known:
            close = difflib.get_close_matches(spec, [*known, "release13"], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
            line = f"eval.tasks: lm-eval has no task {spec}; {hint} A local task is named by its .yaml file"
            lines.append(line)
    if lines:
        raise UserError(*lines)


def load_tasks(settings: Settings) -> dict[str, dict[str, Any]]:
    """lm-eval's tasks by reported name, then by lm-eval's name, with data and settings.

    Raises:
        UserError: a task cannot be loaded, is empty, or runs code that the model writes.
    """
    expanded = expand(settings.names)
    manager = _manager(expanded)
    found: dict[str, dict[str, Any]] = {}
    for name, spec in expanded.items():
        random.seed(settings.seed)  # some tasks shuffle their choices when they are loaded
        np.random.seed(settings.seed)  # noqa: NPY002  it is theirs to draw from
        try:
            tasks = manager.load([_local(Path(spec)) if is_file(spec) else spec])["tasks"]
        except Exception as error:  # lm-eval and datasets raise whatever the task's file, its code or the network does
            raise _unloadable(name, error) from error
        for leaf, task in tasks.items():
            _check_task(leaf, task)
            if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=settings.num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=settings.seed)
        found[name] = dict(tasks)
    leaves = [leaf for tasks in found.values() for leaf in tasks]
    twice = sorted({leaf for leaf in leaves if leaves.count(leaf) > 1})
    if twice:
        raise UserError(f"eval.tasks: {', '.join(twice)} would run twice, by itself and in a group; name it once")
    return found


def fingerprint(tasks: Mapping[str, Mapping[str, Any]], settings: Settings) -> str:
    """Of all that decides the samples and their scoring: settings, task definitions, documents, lm-eval's version.

    Where local files lie is no part of it: a run may be finished on another machine.
    """
    digest = hashlib.sha256(_lm_eval_version().encode())
    digest.update(json.dumps(asdict(settings) | {"names": list(tasks)}).encode())
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
            files |= set(_paths((_local(path, code=False).get("dataset_kwargs") or {}).get("data_files")))
            for file in sorted(files):
                digest.update(file.name.encode() + (file.read_bytes() if file.is_file() else b""))
        except Exception as error:  # whatever YAML's reader raises
            raise _unloadable(name, error) from error
    return digest.hexdigest()[:16]


def _unloadable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"eval.tasks: {name} cannot be loaded: {reason[:400]}")


def require_lm_eval() -> None:
    """Raises UserError where lm-eval, an optional package, is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("eval.tasks: lm-eval is not installed; pip install 'ongrid[eval]'")


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


def count_samples(tasks: Mapping[str, Any], limit: int | None) -> int:
    """How many samples of the tasks of one name are run."""
    sizes = [len(task.eval_docs) for task in tasks.values()]
    return sum(size if limit is None else min(size, limit) for size in sizes)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Runs a model of transformers, quantised or not, on loaded tasks: one row a sample, in the tasks' order.

    Args:
        tasks: from `load_tasks`; an evaluation changes them, so load them anew for every model. Subtasks of a group
            whose metrics differ are reported under their own names.
        progress: called with (tasks done, all tasks).
    """
    import torch
    from accelerate.utils import find_executable_batch_size
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model.eval()
    head = model.get_output_embeddings().weight
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    assert model.get_output_embeddings().weight is head, "lm-eval ties weights anew where the config says tied"
    cuda = next(model.parameters()).device.type == "cuda"

    def run(batch_size: int, leaves: Mapping[str, Any]) -> Any:
        # lm-eval's own search tries the model's longest context, of which a task needs a hundredth.
        lm.batch_size_per_gpu = batch_size
        for task in leaves.values():  # a second try must draw the few-shot examples of the first
            task.set_fewshot_seed(seed=settings.seed)
        with torch.inference_mode():
            return evaluate(
                lm,
                {"tasks": dict(leaves), "groups": {}, "group_map": {}},
                limit=settings.limit,
                bootstrap_iters=0,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )

    found: list[Row] = []
    for done, (name, leaves) in enumerate(tasks.items()):
        if progress is not None:
            progress(done, len(tasks))
        sizes = [settings.batch_size or (_LARGEST_BATCH if cuda else 8)]
        search = find_executable_batch_size(run, sizes[0], lambda sizes=sizes: _halve(sizes))
        result = search(leaves)
        rows = [row for leaf, task in leaves.items() for row in _rows(name, leaf, task, result["samples"][leaf])]
        pooled = len({(row.metric, row.higher_is_better) for row in rows}) == 1
        found += rows if pooled else [replace(row, name=row.task) for row in rows]
    if progress is not None:
        progress(len(tasks), len(tasks))
    return found


def _halve(sizes: list[int]) -> int:
    """The next batch size to try; accelerate's own takes a tenth off, and a task begins anew with each."""
    sizes.append(sizes[-1] // 2)
    return sizes[-1]


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Writes a parquet file with a column for each field of `Row`; `load_rows` reads it back."""
    import pyarrow
    import pyarrow.parquet

    types = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_()}
    schema = pyarrow.schema(
        [(name, types[str(field.type).split(" ")[0]]) for name, field in Row.__dataclass_fields__.items()]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two runs may fill one cache
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=schema), temporary)
    temporary.replace(path)


def load_rows(path: Path) -> list[Row]:
    """Reads what `save_rows` wrote."""
    import pyarrow.parquet

    return [Row(**row) for row in pyarrow.parquet.read_table(path).to_pylist()]


def _manager(expanded: Mapping[str, str]) -> Any:
    """lm-eval's index of tasks; its own thousands (five seconds) only where one of them is asked for."""
    import logging

    require_lm_eval()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not all(map(is_file, expanded.values())))


def _local(path: Path, *, code: bool = True) -> dict[str, Any]:
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
            return str(found.resolve()) if found.exists() else files
        case list():
            return [_beside(path, file) for file in files]
        case dict():
            return {key: _beside(path, file) for key, file in files.items()}
    return files


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False) or getattr(task.config, "unsafe_code", False):
        raise UserError(f"eval.tasks: {name} runs code that the model writes, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"eval.tasks: {name} needs images or sound, and a language model has none; leave it out")
    if not len(task.eval_docs):
        raise UserError(f"eval.tasks: {name} has no samples; look at its test_split and data_files")


def _rows(name: str, leaf: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    filters = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
    chosen = _FILTER if _FILTER in filters else filters[0]
    shown = [sample for sample in samples if sample["filter"] == chosen]
    directions = task.higher_is_better()
    listed = [metric for metric in directions if metric in shown[0]["metrics"]] or shown[0]["metrics"]
    measured = {metric: [_measured(metric, sample.get(metric)) for sample in shown] for metric in listed}
    metric = next((metric for metric, results in measured.items() if None not in results), None)
    results = [(None, 1.0)] * len(shown) if metric is None else measured[metric]
    unit = None if metric is None else _PER_UNIT.get(metric, metric)
    better = metric not in _PER_UNIT and directions.get(metric) is not False
    for sample, result in zip(shown, results, strict=True):
        value, weight = result or (None, 1.0)
        yield Row(
            name=name,
            task=leaf,
            doc_id=int(sample["doc_id"]),
            doc_hash=str(sample["doc_hash"]),
            metric=unit,
            value=value,
            weight=weight,
            higher_is_better=better,
            prompt=str(sample["arguments"][0][0]),
            target=_target(sample["target"], sample["arguments"]),
            response=_response(sample),
        )


def _measured(metric: str, result: Any) -> tuple[float, float] | None:
    """(value, weight) of a sample, None where the metric exists of the whole task only (bleu, a corpus's f1)."""
    try:
        if metric == "perplexity":  # lm-eval's name for the answer's log-likelihood
            return -float(result), 1.0
        if metric in _PER_UNIT:
            log_likelihood, weight = result
            return -float(log_likelihood), float(weight)
        return float(result), 1.0
    except (TypeError, ValueError):
        return None


def _target(target: Any, arguments: Sequence[Any]) -> str:
    """A choice's number as its text."""
    choice = isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(arguments)
    if choice and len(arguments[target]) > 1 and isinstance(arguments[target][1], str):
        return str(arguments[target][1])
    return str(target)


def _response(sample: Mapping[str, Any]) -> str:
    """What was generated; of a choice the most likely one and its log-likelihood; of a text its log-likelihood."""
    results = [response[0] for response in sample["resps"]]
    if isinstance(results[0], (tuple, list)):
        best = max(range(len(results)), key=lambda index: float(results[index][0]))
        same = len({str(arguments[1]) for arguments in sample["arguments"]}) == 1  # the choice is in the prompt
        said = sample["arguments"][best][0 if same and len(results) > 1 else 1]
        return f"{said} ({float(results[best][0]):.3f})"
    return str(results[0]) if isinstance(results[0], str) else f"{float(results[0]):.3f}"


def _plain(value: Any) -> str:
    """For JSON: functions and other objects by name, never by address."""
    return str(getattr(value, "__name__", None) or type(value).__name__)
