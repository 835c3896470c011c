"""Checkpoints as `quantize eval` may be given them: which can be measured, in which dtype, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.files import read_mapping, weight_files

MODEL, REFERENCE = "model", "reference"
"""Keys of what is evaluated, and of what it is compared with."""
FORMAT = ("scheme", "target", "group_size", "skip")
"""What the worker takes for a format."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the page.

    Attributes:
        id: its key in eval.json.
        name: in tables and sentences.
        folder: checkpoint that is loaded; of a simulation its 16-bit source, of a stored arm the run.
        dtype: what it computes in, as the worker takes it; None = as its config.json says.
        computes_in: the same for readers.
        simulate: format that is simulated; None = it is what it is.
        grid: weights as they were trained, of a simulation.
        stored: scores that a run has; nothing is measured then.
        disk_mib: of a stored arm, where the run knows it.
    """

    id: str
    name: str
    folder: Path
    dtype: str | None
    computes_in: str
    simulate: Mapping[str, Any] | None = None
    grid: Path | None = None
    stored: Path | None = None
    disk_mib: float | None = None


def check_model(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """config.json of a model that can be measured: plain, quantised by torchao, or packed (as it is unpacked).

    Raises:
        UserError: it is none of them.
    """
    from quantize.packed import is_packed
    from quantize.sources import check_source, refuse_other_models

    path = folder / "config.json"
    settings = read_mapping(path) if path.is_file() else {}
    if path.is_file() and is_packed(folder):
        settings = dict(settings.get("config") or {})
        refuse_other_models(folder, settings)
    elif is_quantised(settings):
        method = settings["quantization_config"].get("quant_method")
        if method != "torchao":
            raise UserError(f"{folder} is quantised by {method}; only torchao's and unquantised models are measured")
        refuse_other_models(folder, settings)
        if not weight_files(folder):
            raise UserError(f"{folder} has no model.safetensors; copy the whole folder")
    else:
        check_source(folder, trust_remote_code=trust_remote_code)
    return settings


def is_quantised(settings: Mapping[str, Any]) -> bool:
    """Whether config.json says so."""
    return bool(settings.get("quantization_config"))


def dtypes(settings: Mapping[str, Any], plain: str) -> dict[str, Any]:
    """A quantised model computes in what it was written for, all others alike."""
    if not is_quantised(settings):
        return {"dtype": plain, "computes_in": plain}
    return {"dtype": None, "computes_in": str(settings.get("dtype") or settings.get("torch_dtype") or "float32")}


def plain_dtype(shipped: str | None) -> str:
    """What 16-bit models compute in: what ships does, on a GPU; a CPU in float32, where bf16 is emulated and slow."""
    import torch

    return (shipped or "bfloat16") if torch.cuda.is_available() else "float32"


def name_of(asked: str, folder: Path) -> str:
    """A folder's own name; of a hub id, whose folder is called by its commit, the id."""
    return folder.resolve().name if Path(asked).expanduser().is_dir() else asked


def find_reference(
    named: str, root: str, plain: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Model:
    """The model that a user or a record names by folder or hub id; `plain` is what unquantised ones compute in.

    Raises:
        UserError: there is none, or it cannot be measured.
    """
    from quantize.sources import find_source

    folder = find_source(named, root, revision=revision, trust_remote_code=trust_remote_code)
    settings = check_model(folder, trust_remote_code=trust_remote_code)
    return Model(id=REFERENCE, name=name_of(named, folder), folder=folder, **dtypes(settings, plain))


def quantised_or_simulated(
    name: str,
    folder: Path,
    chosen: Mapping[str, Any],
    asked: str | None,
    source: Model | str,
    grid: Path | None,
    algorithms: Sequence[Any] = (),
) -> tuple[Model, list[str]]:
    """The quantised model as it lies in `folder`, or its simulation where another target is asked for or none runs.

    Args:
        name: what it is called.
        folder: where it lies, or would.
        chosen: its format, {scheme, target, group_size, skip}.
        asked: target that is asked for; None = its own.
        source: the 16-bit model to simulate it from, or why there is none.
        grid: weights as they were trained.
        algorithms: what chose its numbers; empty = rounded to nearest.

    Returns:
        the model, and notes for the reader.

    Raises:
        UserError: no such target, or it neither runs here nor can be simulated.
    """
    from quantize.hardware import missing_for
    from quantize.schemes import find_scheme

    scheme = find_scheme(chosen["scheme"])
    own, target = scheme.find_target(chosen["target"]), scheme.find_target(asked or chosen["target"])
    missing = missing_for(target)
    written = (folder / "config.json").is_file()
    if written and not missing and target is own:
        settings = check_model(folder)
        return Model(id=MODEL, name=name, folder=folder, **dtypes(settings, "float32")), []
    reason = f"this machine lacks {'; '.join(missing)}" if missing else ""
    if not reason:
        reason = f"{folder} is not written" if target is own else f"{folder} is for {own.name}, not {target.name}"
    cannot = f"{folder} cannot be measured as {scheme.name} for {target.name} here: {reason}, and"
    if isinstance(source, str):
        raise UserError(f"{cannot} there is no 16-bit model to simulate it from: {source}")
    if algorithms:
        raise UserError(
            f"{cannot} a simulation rounds to nearest, while its numbers were chosen by "
            f"{', '.join(map(str, algorithms))}; measure it where {target.name} runs"
        )
    form = {**{key: chosen[key] for key in FORMAT}, "target": target.name}
    form["group_size"] = scheme.pick_group_size(chosen["group_size"], target) if chosen["group_size"] else None
    trained = grid if own.numbers() is target.numbers() else None
    note = f"{name} is simulated, {scheme.name} for {target.name}, from {source.folder}: {reason}."
    return replace(source, id=MODEL, name=f"{name} (simulated)", simulate=form, grid=trained), [note]
