"""HQQ, half-quadratic quantisation (Badri and Shaji 2023, mobiusml.github.io/hqq_blog), without calibration data.

It minimises |w - restored|^p over the group, p < 1, so that outliers weigh less than in a squared error. The problem is
split in two that have closed solutions: the errors e by generalised soft thresholding, and, with the integers held, the
zero point (asymmetric grids) or the scale (symmetric ones) by least squares on w - e.

Shapes: `O` out_features, `I` in_features, `G` groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantize.numerics import Numbers, Quantised

_P, _BETA, _GROWTH = 0.7, 10.0, 1.01  # as published
_STEPS = 20


@torch.no_grad()
def round_hqq(numbers: Numbers, weight: Tensor, group_size: int | None, scale_dtype: torch.dtype) -> Quantised:
    """The weight (O, I), float32, on a grid whose zero points or scales HQQ chose.

    A group keeps the best of the grids that the iterations went through, the one of its extremes among them. It never
    depends on other groups, as by an early end: a conversion that goes by rows must choose what a whole weight would.
    """
    start = best = numbers.quantise(weight, group_size, scale_dtype, None)
    least = _error(numbers, weight, best)
    beta = _BETA
    for _ in range(_STEPS):
        residual = _grouped(weight, start) - _grouped(numbers.restore(start, torch.float32), start)
        wanted = _grouped(weight, start) - _shrink(residual, beta)
        start = _solve(start, wanted)
        start = replace(start, values=numbers.nearest(weight, start))
        error = _error(numbers, weight, start)
        better = error < least
        best, least = _take(better, start, best), torch.where(better, error, least)
        beta *= _GROWTH
    return best


def _grouped(weight: Tensor, quantised: Quantised) -> Tensor:
    return weight.float().reshape(*quantised.scale.shape, -1)  # (O, G, group size)


def _shrink(residual: Tensor, beta: float) -> Tensor:
    """Generalised soft thresholding: the proximal operator of |e|^p, to first order."""
    size = residual.abs()
    return residual.sign() * (size - size.clamp(min=1e-8).pow(_P - 1) / beta).clamp(min=0)


def _solve(quantised: Quantised, wanted: Tensor) -> Quantised:
    """The zero points, or else the scales, with the least squared distance of the restored weights from `wanted`."""
    values, scale = _grouped(quantised.values, quantised), quantised.scale.float()
    if quantised.zero is not None:
        zero = (wanted - (values - 8) * scale.unsqueeze(-1)).mean(-1)
        return replace(quantised, zero=zero.to(quantised.zero.dtype))
    energy = values.square().sum(-1)
    fitted = torch.where(energy > 0, (values * wanted).sum(-1) / energy.clamp(min=1e-12), scale)
    fitted = torch.where(fitted > 0, fitted, scale)
    return replace(quantised, scale=fitted.to(quantised.scale.dtype))


def _error(numbers: Numbers, weight: Tensor, quantised: Quantised) -> Tensor:
    """Mean |w - restored|^p of each group, (O, G)."""
    difference = _grouped(weight, quantised) - _grouped(numbers.restore(quantised, torch.float32), quantised)
    return difference.abs().pow(_P).mean(-1)


def _take(better: Tensor, new: Quantised, old: Quantised) -> Quantised:
    """`new` in the groups that are better, `old` elsewhere."""
    values = torch.where(better.unsqueeze(-1), _grouped(new.values, new), _grouped(old.values, old))
    zero = None if new.zero is None or old.zero is None else torch.where(better, new.zero, old.zero)
    return replace(
        old, values=values.reshape(old.values.shape), scale=torch.where(better, new.scale, old.scale), zero=zero
    )
