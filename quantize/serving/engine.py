"""What a run must know of the engine that its tasks run in, before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantize.errors import UserError
from quantize.hardware import has_nvidia_driver
from quantize.schemes import Scheme, Target
from quantize.serving.environment import Vllm, find_vllm

_DECIDES = ("vllm", "torch", "torchao")
"""Packages of vLLM's environment that decide what a model answers."""


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
