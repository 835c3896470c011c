"""Algorithms that choose a format's numbers: which exist, what they need, and where they make sense. Imports no torch.

Some change the 16-bit model so that it quantises better and computes the same (`moves`: SpinQuant, AWQ, SmoothQuant):
what they change is merged into the weights and leaves nothing to do at run time. The others choose the integers and
scales of each weight (`rounds`: mse, HQQ, GPTQ; without one, round-to-nearest). One of each kind may be combined.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from quantize.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One way to choose numbers.

    Attributes:
        name: what users type.
        summary: one line for --help and the docs.
        kind: "rotates" and "scales" change the model before it is quantised, "rounds" chooses the grid's points.
        calibrated: it looks at activations, so it needs samples.
        integers_only: it makes no sense for float formats, with the reason.
    """

    name: str
    summary: str
    kind: Literal["rotates", "scales", "rounds"]
    calibrated: bool = False
    integers_only: str | None = None


_ALL = (
    Algorithm(name="rtn", kind="rounds", summary="round to nearest within each group's extremes (the default)"),
    Algorithm(
        name="mse",
        kind="rounds",
        summary="the range of each group with the least squared error of its weights",
        integers_only="a float's steps shrink with its value, so a narrower range gains nothing",
    ),
    Algorithm(
        name="hqq",
        kind="rounds",
        summary="half-quadratic quantisation: zero points, or else scales, under an error robust to outliers",
        integers_only="it moves the zero point or the scale of an integer grid",
    ),
    Algorithm(
        name="gptq",
        kind="rounds",
        calibrated=True,
        summary="GPTQ: each column's rounding error is made good by the columns after it, on calibration data",
    ),
    Algorithm(
        name="awq",
        kind="scales",
        calibrated=True,
        summary="AWQ: scales up the input channels that see large activations, merged into the layer before",
    ),
    Algorithm(
        name="smoothquant",
        kind="scales",
        calibrated=True,
        summary="SmoothQuant: moves activation outliers into the weights, merged into the layer before",
    ),
    Algorithm(
        name="spinquant",
        kind="rotates",
        summary="random Hadamard rotations of the residual stream and of values, merged into the weights",
    ),
)

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType({each.name: each for each in _ALL})


def describe_algorithms() -> str:
    """Their names by kind, for --help: "hqq | gptq, awq | smoothquant"."""
    kinds: dict[str, list[str]] = {}
    for each in _ALL:
        kinds.setdefault(each.kind, []).append(each.name)
    return ", ".join(" | ".join(names) for names in kinds.values())


def check_algorithms(names: Sequence[str]) -> tuple[str, ...]:
    """The algorithms in the order in which they work: rotate, scale, round.

    Raises:
        UserError: a name is unknown, or two of them do the same.
    """
    for name in names:
        if name not in ALGORITHMS:
            near = difflib.get_close_matches(name, ALGORITHMS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown algorithm {name!r}; {hint}choose from {', '.join(ALGORITHMS)}")
    chosen: dict[str, str] = {}
    for name in names:
        kind = ALGORITHMS[name].kind
        if kind in chosen:
            raise UserError(
                f"algorithms {chosen[kind]} and {name} cannot be combined: both say how the model "
                f"{_WHAT[kind]}; choose one"
            )
        chosen[kind] = name
    return tuple(chosen[kind] for kind in ("rotates", "scales", "rounds") if kind in chosen)


_WHAT = {"rotates": "is rotated", "scales": "is scaled", "rounds": "is rounded"}


def are_calibrated(names: Sequence[str]) -> bool:
    """Whether any of them needs samples."""
    return any(ALGORITHMS[name].calibrated for name in names)
