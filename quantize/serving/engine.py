"""What a run must know of the engine that its tasks run in, before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.hardware import has_nvidia_driver
from quantize.schemes import Scheme, Target
from quantize.serving.environment import Vllm, find_vllm

_DECIDES = ("vllm", "torch", "torchao")
"""Packages of vLLM's environment that decide what a model answers."""
_ASKED = "eval.engine=vllm"
_BFLOAT16 = 8.0
"""Compute capability from which on vLLM takes an unquantised model in bfloat16 (vllm/platforms/cuda.py)."""


def find_engine(name: str) -> dict[str, Any] | None:
    """The engine of that name as jobs and gathered.json hold it: {name, version, packages}; None for transformers,
    which the run's own packages tell.

    Raises:
        UserError: it is not installed, or this machine has no GPU for it.
    """
    if name != "vllm":
        return None
    lines: list[str] = []
    try:
        found = describe(find_vllm())
    except UserError as error:
        # A run has no option that names an environment.
        lines += [f"eval.engine=vllm: {line.replace('--env FOLDER or ', '')}" for line in error.lines]
    if not has_nvidia_driver():
        lines.append("eval.engine=vllm: it needs an NVIDIA GPU, and no driver was found; use eval.engine=transformers")
    if lines:
        raise UserError(*lines)
    return found


def describe(vllm: Vllm) -> dict[str, Any]:
    """{name, version, packages} of an installed vLLM."""
    packages = {name: vllm.packages[name] for name in _DECIDES if name in vllm.packages}
    return {"name": "vllm", "version": vllm.version, "packages": packages}


def engine_words(engine: Mapping[str, Any] | None) -> str:
    """`vLLM 0.23.0`; `transformers` for None."""
    return "transformers" if engine is None else f"vLLM {engine['version']}"


def find_same(engine: Mapping[str, Any]) -> Vllm:
    """The vLLM that an earlier step of the run found.

    Raises:
        UserError: it is another one by now, whose results would not pair with those that there are.
    """
    found = find_vllm()
    if describe(found) != dict(engine):
        here, there = (", ".join(map(" ".join, each["packages"].items())) for each in (describe(found), engine))
        raise UserError(
            f"eval.engine=vllm: {found.executable} ({found.found}) holds {here}, and the other arms' tasks ran with "
            f"{there}: results of the two make no pairs; name that environment in $ONGRID_VLLM"
        )
    return found


def find_gpu() -> tuple[str | None, str]:
    """(compute capability as "9.0", name) of the GPU that vLLM takes; (None, "") where nvidia-smi tells of none."""
    from quantize.doctor.machine import find_gpus

    gpus = find_gpus()
    return (gpus[0].capability, gpus[0].name) if gpus else (None, "")


def check_folders(
    engine: Mapping[str, Any], folders: Mapping[Path, str | None], *, trust_remote_code: bool = False
) -> None:
    """Whether vLLM serves each of these checkpoints, here, before anything is measured on one of them.

    Args:
        engine: from `find_engine`.
        folders: each with what it computes in; None = as it says.

    Raises:
        UserError: what it would refuse, of all of them, a line each.
    """
    from quantize.serving.check import check_folder, check_gpu

    vllm, here = find_same(engine), find_gpu()
    lines: list[str] = []
    for folder, dtype in folders.items():
        try:
            served = check_folder(folder, vllm, chat=False, trust_remote_code=trust_remote_code)
            check_gpu(served, *here)
            refuse_dtype(dtype if served.target is None else None, *here)
        except UserError as error:
            lines += (line if line.startswith(_ASKED) else f"{_ASKED}: {line}" for line in error.lines)
    if lines:
        raise UserError(*dict.fromkeys(lines))


def refuse_gpu(shipped: tuple[Scheme, Target] | None, dtype: str) -> None:
    """Raises UserError where this machine's GPU is too old for what ships, or for the 16-bit models beside it.

    Args:
        shipped: format; None = nothing is quantised.
        dtype: what the 16-bit models compute in.
    """
    from quantize.serving.check import Served, check_gpu

    here = find_gpu()
    refuse_dtype(dtype, *here)
    if shipped is None:
        return
    try:
        check_gpu(Served(Path("what ships"), "", (), *shipped, chats=False), *here)
    except UserError as error:
        raise UserError(
            *(f"{_ASKED}: {line}; or run the tasks with eval.engine=transformers" for line in error.lines)
        ) from error


def refuse_dtype(dtype: str | None, capability: str | None, gpu: str) -> None:
    """Raises UserError where vLLM does not compute in that dtype on that GPU."""
    if dtype == "bfloat16" and capability is not None and float(capability) < _BFLOAT16:
        raise UserError(
            f"{_ASKED}: the 16-bit models compute in bfloat16 here, for which vLLM wants compute capability "
            f"{_BFLOAT16} or newer, and {gpu} has {capability}; run the tasks with eval.engine=transformers"
        )


def refuse_unserved(scheme: Scheme, targets: Sequence[Target]) -> None:
    """Raises UserError where vLLM loads the format for none of these targets."""
    if targets and all(target.vllm for target in targets):
        reasons = dict.fromkeys(target.vllm for target in targets)
        names = " or ".join(target.name for target in targets)
        others = [target.name for target in scheme.targets.values() if not target.vllm]
        hint = f"set quantize.target={' or '.join(others)}, or " if others else ""
        raise UserError(
            f"eval.engine=vllm: vLLM does not run {scheme.name} for {names} ({'; '.join(reasons)}); {hint}run the "
            "tasks with eval.engine=transformers"
        )
