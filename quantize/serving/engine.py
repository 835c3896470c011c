"""What a run must know of the engine that its tasks run in, before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.hardware import has_nvidia_driver
from quantize.schemes import Scheme, Target
from quantize.serving.environment import Vllm, find_vllm
from quantize.serving.gpu import BFLOAT16, capability_of, check_driver, check_gpu, find_gpu, refuse_old

if TYPE_CHECKING:
    from quantize.doctor.machine import Gpu

_DECIDES = ("vllm", "torch", "torchao")
"""Packages of vLLM's environment that decide what a model answers."""
ASKED = "eval.engine=vllm"
INSTEAD = "run the tasks with eval.engine=transformers"


def find_engine(name: str) -> dict[str, Any] | None:
    """The engine of that name as jobs and gathered.json hold it: {name, version, packages}; None for transformers,
    which the run's own packages tell.

    Raises:
        UserError: it is not installed, or this machine has no GPU or no driver for it.
    """
    if name != "vllm":
        return None
    lines: list[str] = []
    try:
        vllm, gpu = find_vllm(), find_gpu()
        found = describe(vllm)
        if gpu is not None:
            check_driver(vllm, gpu.driver)
    except UserError as error:
        # A run has no option that names an environment.
        lines += [f"{ASKED}: {line.replace('--env FOLDER or ', '')}" for line in error.lines]
    if not has_nvidia_driver():
        lines.append(f"{ASKED}: it needs an NVIDIA GPU, and no driver was found; {INSTEAD}")
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
            f"{ASKED}: {found.executable} ({found.found}) holds {here}, and the other arms' tasks ran with "
            f"{there}: results of the two make no pairs; name that environment in $ONGRID_VLLM"
        )
    return found


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
    from quantize.serving.check import check_folder

    vllm, gpu = find_same(engine), find_gpu()
    lines: list[str] = []
    for folder, dtype in folders.items():
        try:
            served = check_folder(folder, vllm, chat=False, trust_remote_code=trust_remote_code)
            if gpu is not None:
                check_gpu(served, gpu)
                refuse_dtype(dtype, gpu)
        except UserError as error:
            lines += (line if line.startswith(ASKED) else f"{ASKED}: {line}" for line in error.lines)
    if lines:
        raise UserError(*dict.fromkeys(lines))


def refuse_gpu(shipped: tuple[Scheme, Target] | None, dtype: str) -> None:
    """Raises UserError where this machine's GPU is too old for what ships, or for the 16-bit models beside it.

    Args:
        shipped: format; None = nothing is quantised.
        dtype: what the 16-bit models compute in.
    """
    gpu = find_gpu()
    if gpu is None:
        return
    refuse_dtype(dtype, gpu)
    if shipped is None:
        return
    try:
        refuse_old(gpu, "what ships", *shipped, dtype="")  # refuse_dtype has looked at that
    except UserError as error:
        raise UserError(*(f"{ASKED}: {line}; or {INSTEAD}" for line in error.lines)) from error


def refuse_dtype(dtype: str | None, gpu: Gpu) -> None:
    """Raises UserError where vLLM takes no unquantised model in that dtype on that GPU."""
    here = capability_of(gpu)
    if dtype == "bfloat16" and here is not None and here < BFLOAT16:
        raise UserError(
            f"{ASKED}: the 16-bit models compute in bfloat16 here, for which vLLM wants compute capability "
            f"{'.'.join(map(str, BFLOAT16))} or newer, and {gpu.name} has {gpu.capability}; {INSTEAD}"
        )


def refuse_unserved(scheme: Scheme, targets: Sequence[Target]) -> None:
    """Raises UserError where vLLM loads the format for none of these targets."""
    if targets and all(target.vllm for target in targets):
        reasons = dict.fromkeys(target.vllm for target in targets)
        names = " or ".join(target.name for target in targets)
        others = [target.name for target in scheme.targets.values() if not target.vllm]
        hint = f"set quantize.target={' or '.join(others)}, or " if others else ""
        raise UserError(f"{ASKED}: vLLM does not run {scheme.name} for {names} ({'; '.join(reasons)}); {hint}{INSTEAD}")
