"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounding errors made good by the columns that are still to be rounded.

The columns are taken in the order of the Hessian's diagonal, largest first, with every group's scale chosen before
(static groups), so that any layout keeps its groups of neighbouring columns.

Shapes: `O` out_features, `I` in_features, `G` groups, `N` calibration tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantize.numerics import Numbers, Quantised

_DAMPING = 0.01  # of the diagonal's mean, as published
_BLOCK = 128  # columns whose errors are gathered before they are carried over to the rest: one product for many


@torch.no_grad()
def round_gptq(
    numbers: Numbers, weight: Tensor, group_size: int | None, scale_dtype: torch.dtype, hessian: Tensor
) -> Quantised:
    """The weight (O, I), float32, on the grid of its groups' extremes, with the least error of the layer's output.

    Args:
        hessian: (I, I) sum of x x^T over the calibration tokens, of the inputs as the layer multiplies them.
    """
    hessian = hessian.float().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    start = numbers.quantise(weight, group_size, scale_dtype, None)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    inverse = _inverse_root(hessian[order][:, order])
    places = order.tolist()
    per_group = weight.shape[1] // start.scale.shape[1]
    remaining, values = weight[:, order], torch.empty_like(start.values)
    for begin in range(0, weight.shape[1], _BLOCK):
        end = min(begin + _BLOCK, weight.shape[1])
        errors = torch.empty_like(remaining[:, begin:end])
        for column in range(begin, end):
            now, original = remaining[:, column : column + 1], places[column]
            chosen = _column(start, original // per_group, now)
            chosen = replace(chosen, values=numbers.nearest(now, chosen))
            values[:, original] = chosen.values[:, 0]
            error = (now - numbers.restore(chosen, torch.float32)) / inverse[column, column]
            remaining[:, column + 1 : end] -= error * inverse[column, column + 1 : end]
            errors[:, column - begin] = error[:, 0]
        remaining[:, end:] -= errors @ inverse[begin:end, end:]
    return replace(start, values=values)


def _column(quantised: Quantised, group: int, values: Tensor) -> Quantised:
    """The grid of one group, for one column (O, 1)."""
    zero = None if quantised.zero is None else quantised.zero[:, group : group + 1]
    return replace(quantised, values=values, scale=quantised.scale[:, group : group + 1], zero=zero)


def _inverse_root(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse; damped more where rounding made it indefinite."""
    mean = hessian.diagonal().mean()
    for damping in (_DAMPING, 0.1, 1.0):
        damped = hessian + torch.diag(torch.full_like(hessian.diagonal(), float(damping * mean)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return upper
    raise RuntimeError("GPTQ's Hessian is not positive definite however much it is damped: its inputs are NaN or huge")
