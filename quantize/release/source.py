"""A quantised checkpoint that can be released, as its folder and, where there is one, its run tell it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.contract import find_faults
from quantize.errors import UserError
from quantize.files import is_neither, read_mapping
from quantize.record import RECORD, read_record
from quantize.release.base_model import BaseModel, find_base
from quantize.runs import find_run, finish_command, read_gathered, renew_command
from quantize.schemes import SCHEMES, Scheme, Target

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Release:
    """One quantised checkpoint.

    Attributes:
        folder: where it lies.
        name: what code loads it by: the folder, or a repository of the hub.
        base: what it was made from.
        scheme, target, group_size, skip: the format; scheme None = not recorded.
        dtype: of what is not quantised; None = not recorded.
        settings: its config.json.
        coverage: `quantize.layers.Coverage.as_dict`; empty = not recorded.
        algorithms: what chose the numbers; empty = rounded to nearest, or not recorded.
        calibration: the data that they looked at, in words.
        notes: what they did and left out, in words.
        trained: its numbers are those of a training whose run is not at hand.
        versions: packages by name, python and the source's commit among them.
        device: the machine that made it, in words; empty = not recorded.
        metrics, gathered: of the run that made it; empty = a conversion without a run.
        evaluation: what `quantize eval` found of it (eval.json); empty = nothing, or a run.
        rows: what the run's data came to, by split (see `train.data.Prepared.statistics`).
    """

    folder: Path
    name: str
    base: BaseModel
    scheme: str | None
    target: str | None
    group_size: int | None = None
    skip: Sequence[str] = ()
    dtype: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    coverage: Mapping[str, Any] = field(default_factory=dict)
    algorithms: Sequence[str] = ()
    calibration: Mapping[str, Any] | str | None = None
    notes: Sequence[str] = ()
    trained: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    gathered: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """It was trained or measured by a run."""
        return bool(self.metrics)

    @property
    def experts(self) -> bool:
        """Fused experts are quantised in it (`quantize.experts`)."""
        return ".experts." in json.dumps(self.settings.get("quantization_config") or {})

    @property
    def qat(self) -> bool:
        """It was trained for its format."""
        return bool(self.gathered.get("qat")) or self.trained

    @property
    def entry(self) -> Scheme | None:
        """Its scheme, where this version knows it."""
        return SCHEMES.get(self.scheme or "")

    @property
    def place(self) -> Target | None:
        """Its target, where this version knows it."""
        return self.entry.targets.get(self.target or "") if self.entry is not None else None

    @property
    def size_mib(self) -> float:
        """MiB of its weights on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors")) / _MIB

    @property
    def own_code(self) -> bool:
        """Loading it runs Python that lies beside the weights."""
        return bool(self.settings.get("auto_map"))

    @property
    def chats(self) -> bool:
        """Its tokenizer has a chat template."""
        if (self.folder / "chat_template.jinja").is_file():
            return True
        path = self.folder / "tokenizer_config.json"
        return path.is_file() and bool(read_mapping(path).get("chat_template"))


def find_release(source: str, root: str, name: str | None = None, evaluation: Path | None = None) -> Release:
    """The release of a run, or in a folder that `quantize convert` wrote.

    Args:
        name: what code will load it by; None = its folder.
        evaluation: of a folder, what `quantize eval` wrote; None = FOLDER-eval beside it or here, where that is there.

    Raises:
        UserError: neither of them, not finished, only simulated, or damaged.
    """
    run = find_run(source, root)
    if run is not None:
        if evaluation is not None:
            raise UserError("--evaluation: a run has an evaluation of its own, which its card shows; leave it out")
        return _of_finished_run(run, name)
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file():
        raise is_neither(source, root, "a folder that quantize convert wrote")
    return of_folder(folder, name, evaluation)


def _of_finished_run(run: Path, name: str | None) -> Release:
    if not (run / "metrics.json").is_file():
        raise UserError(f"{run} is not finished; continue it with: train --resume {run}")
    metrics, gathered = read_mapping(run / "metrics.json"), read_gathered(run)
    faults = find_faults(metrics)
    if faults:
        raise UserError(
            f"{run / 'metrics.json'} is damaged or of another version ({'; '.join(faults[:3])}); renew it with: "
            f"{renew_command(run)}"
        )
    if metrics["scheme"] is None:
        raise UserError(
            f"{run} quantises nothing, so there is nothing to release; use: quantize convert {run / 'merged'} "
            "--scheme NAME"
        )
    if metrics["simulated"]:
        raise UserError(
            f"{run} was only simulated ({'; '.join(metrics['missing']) or 'its target does not run here'}): what ships "
            f"is not written yet. Finish it where the target runs: {finish_command(run, metrics['target'])}"
        )
    if not (run / "quantized" / "config.json").is_file():
        raise UserError(f"{run} has no quantized/config.json; make it again with: {renew_command(run)}")
    return of_run(run, metrics, gathered, name)


def of_run(run: Path, metrics: Mapping[str, Any], gathered: Mapping[str, Any], name: str | None = None) -> Release:
    """The release of a finished run, from what its report is made of.

    Args:
        metrics: as in metrics.json.
        gathered: as in gathered.json.
        name: as for `find_release`.
    """
    folder, chosen, model = run / "quantized", gathered["format"], gathered["recipe"]["model"]
    asked = gathered["recipe"].get("quantize") or {}
    manifest = read_mapping(run / "manifest.json") if (run / "manifest.json").is_file() else {}
    record = read_record(folder)
    finished, trained = gathered.get("finished") or gathered["trained_on"], gathered["trained_on"]
    return Release(
        folder=folder,
        name=name or _loadable(folder),
        base=find_base(
            model["id"],
            random=model.get("random") is not None,
            architecture=model.get("architecture"),
            revision=model.get("revision"),
            license=record.get("license"),
        ),
        scheme=chosen["scheme"],
        target=chosen["target"],
        group_size=chosen["group_size"],
        skip=tuple(chosen["skip"]),
        dtype=gathered["dtype"],
        settings=read_mapping(folder / "config.json"),
        coverage=gathered["shipped"]["coverage"],
        algorithms=_names(record.get("algorithms") or asked.get("algorithm")),
        calibration=record.get("calibration") or asked.get("calibration"),
        notes=_names(record.get("notes")),
        versions=_versions(gathered, manifest),
        device="; trained on ".join(dict.fromkeys([finished["device"], trained["device"]])),
        metrics=metrics,
        gathered=gathered,
        rows=manifest.get("data") or {},
    )


def of_folder(folder: Path, name: str | None = None, evaluation: Path | None = None) -> Release:
    """The release in a folder, from what its conversion recorded.

    Raises:
        UserError: it is not quantised by torchao, or a file of it cannot be read.
    """
    settings = read_mapping(folder / "config.json")
    if (settings.get("quantization_config") or {}).get("quant_method") != "torchao":
        packed = "ongrid_packed" in settings
        how = f"is packed, which ongrid alone loads; use: quantize convert {folder} --unpack"
        raise UserError(
            f"{folder} {how if packed else f'is not quantised; use: quantize convert {folder} --scheme NAME'}"
        )
    record = read_record(folder)
    source = str(record.get("source") or "")
    unknown = BaseModel(
        title=folder.resolve().name,
        text=f"weights whose source the conversion did not record (no {RECORD})",
        why=f"the source of the weights is not recorded in {RECORD}",
    )
    return Release(
        folder=folder,
        name=name or _loadable(folder),
        base=find_base(source, revision=record.get("revision"), license=record.get("license")) if source else unknown,
        scheme=record.get("scheme"),
        target=record.get("target"),
        group_size=record.get("group_size"),
        skip=tuple(record.get("skip") or ()),
        dtype=record.get("dtype") or settings.get("dtype"),
        settings=settings,
        coverage=record.get("coverage") or {},
        algorithms=_names(record.get("algorithms")),
        calibration=record.get("calibration"),
        notes=_names(record.get("notes")),
        trained=record.get("trained") is True,
        versions={str(key): str(value) for key, value in (record.get("versions") or {}).items()},
        device=str(record.get("device") or ""),
        evaluation=_evaluation(folder, evaluation),
    )


def _evaluation(folder: Path, asked: Path | None) -> dict[str, Any]:
    """eval.json of this very folder; empty where none is asked for and none lies in the usual places."""
    for path in [asked / "eval.json"] if asked else [place / "eval.json" for place in evaluation_places(folder)]:
        if asked is None and not path.is_file():
            continue
        found = read_mapping(path)
        measured = str(((found.get("models") or {}).get("model") or {}).get("folder") or "")
        if Path(measured).resolve() == folder.resolve() or (asked is not None and Path(measured).name == folder.name):
            return found
        if asked is not None:
            raise UserError(f"--evaluation {asked}: it measured {measured or 'something else'}, not {folder}")
    return {}


def evaluation_places(folder: Path) -> list[Path]:
    """Where an evaluation of a folder is looked for: beside it, and where `quantize eval` writes it, in this folder."""
    name = f"{folder.resolve().name}-eval"
    return list(dict.fromkeys([folder.resolve().with_name(name), Path.cwd() / name]))


def _loadable(folder: Path) -> str:
    """A path that is no name of a repository to whoever loads it."""
    return str(folder) if folder.is_absolute() or len(folder.parts) > 2 else f"./{folder}"


def _names(found: Any) -> tuple[str, ...]:
    """A list of texts, or one of them alone."""
    return (found,) if isinstance(found, str) else tuple(str(each) for each in found or ())


def _versions(gathered: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Packages of the training, those of the finishing that differ, python and our own commit."""
    found = {name: str(version) for name, version in gathered["versions"].items()}
    packages = (gathered.get("finished") or {}).get("packages", {})
    others = {name: version for name, version in packages.items() if found.get(name, version) != version}
    found |= {f"{name}, where it was finished": str(version) for name, version in others.items()}
    if manifest.get("python"):
        found["python"] = str(manifest["python"])
    git = manifest.get("git")
    if git and "ongrid" in found:
        found["ongrid"] += f" (commit {git['sha'][:12]}{', with local changes' * bool(git['dirty'])})"
    return found
