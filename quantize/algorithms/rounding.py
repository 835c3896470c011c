"""How one weight finds its place on a format's grid. Shapes: `O` out_features, `I` in_features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.algorithms import ALGORITHMS
from quantize.algorithms.gptq import round_gptq
from quantize.algorithms.hqq import round_hqq
from quantize.numerics import Numbers, Quantised, best_factor


def round_weight(
    name: str,
    numbers: Numbers,
    weight: Tensor,
    group_size: int | None,
    scale_dtype: torch.dtype,
    hessian: Tensor | None = None,
) -> Quantised:
    """A weight (O, I) on its grid, by the algorithm of that name.

    Args:
        name: "rtn", "mse", "hqq" or "gptq"; GPTQ without a Hessian rounds to nearest.
        scale_dtype: what the format ships in; round-to-nearest rounds the weight to it first, as torchao does.
        hessian: (I, I), see `quantize.algorithms.gptq`.
    """
    if name == "gptq" and hessian is not None:
        return round_gptq(numbers, weight.float(), group_size, scale_dtype, hessian)
    if name == "hqq":
        return round_hqq(numbers, weight.float(), group_size, scale_dtype)
    if name == "mse":
        factor = best_factor(numbers, weight.float(), group_size, scale_dtype)
        return numbers.quantise(weight.float(), group_size, scale_dtype, factor)
    return numbers.quantise(weight.to(scale_dtype), group_size, scale_dtype, None)


def pick_rounding(names: Sequence[str]) -> str:
    """The one of them that rounds; round-to-nearest where none does."""
    return next((name for name in names if ALGORITHMS[name].kind == "rounds"), "rtn")
