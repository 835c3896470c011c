"""What the numbers of a format are: how a weight and an input are rounded, and what the layer multiplies.

Training runs these functions as fake quantisers, conversion stores their integers and scales, and tests show that they
equal torchao's real tensors to the bit. The formats themselves are in `quantize.integers`, `quantize.float8` and
`quantize.microscaling`.

Shapes: `O` out_features, `I` in_features, `G` groups (I / group size).

None of them builds a graph; the straight-through estimator is added by `qat.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

VERSION = 2
"""Raised when the numbers of a format change: scores that were kept of them are then evaluated again."""


@dataclass(frozen=True)
class Quantised:
    """A weight on its grid.

    Attributes:
        values: (O, I) the grid's points: integers in any dtype, or float8.
        scale: (O, G), as it ships.
        zero: (O, G) what the integer 8 of an asymmetric grid stands for, as it ships; None where it is symmetric.
        tensor_scale: () float32, multiplies `scale`; None where the format has no scale of the whole tensor.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None = None
    tensor_scale: Tensor | None = None

    def compact(self) -> Quantised:
        """The same with a byte a value: float8 as it is, integers as int8."""
        values = self.values
        return replace(self, values=values if values.dtype == torch.float8_e4m3fn else values.to(torch.int8))


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """One numeric format: the single definition that training, conversion and evaluation share.

    Attributes:
        quantise: (weight (O, I), group size or None, dtype of the scales, factor (O, G) or None) -> the weight on its
            grid. `factor` shrinks or widens the range that the extremes of each group span; None is 1, exactly.
        restore: (quantised, dtype) -> weight (O, I), as the layer reads it.
        activation: round trip of the layer's input (..., I); None where activations stay in 16 bit.
        encode: input (..., I) -> its grid's points and scale (..., 1), for layers that multiply the points themselves;
            `activation` is then the same round trip, restored.
        decode: (what `encode` made, dtype) -> input (..., I), restored.
        linear: (input (..., I), or what `encode` made of it; quantised; bias or None; dtype) -> (..., O) in that dtype,
            for layers that do not compute `linear(activation(x), restore(w), bias)`: those that multiply by the scales
            after the sum.
        span: quantised -> (lowest weight that does not clip, the range's fixed middle, the highest), each (O, G).
        bias_after: the layer adds the bias to the rounded product, which rounds twice.
        nearest: (weight (O, I), quantised) -> the grid's points (O, I) nearest to it under the scales and zero points
            of `quantised`, for algorithms that choose these first (`quantize.algorithms`).
    """

    quantise: Callable[[Tensor, int | None, torch.dtype, Tensor | None], Quantised]
    restore: Callable[[Quantised, torch.dtype], Tensor]
    span: Callable[[Quantised], tuple[Tensor, Tensor, Tensor]]
    activation: Callable[[Tensor], Tensor] | None = None
    encode: Callable[[Tensor], Quantised] | None = None
    decode: Callable[[Quantised, torch.dtype], Tensor] | None = None
    linear: Callable[[Any, Quantised, Tensor | None, torch.dtype], Tensor] | None = None
    bias_after: bool = False
    nearest: Callable[[Tensor, Quantised], Tensor]

    def round_trip(self, weight: Tensor, group_size: int | None) -> Tensor:
        """`restore(quantise(weight))` in the weight's own dtype: what rounding to nearest ships."""
        return self.restore(self.quantise(weight, group_size, weight.dtype, None), weight.dtype)

    @torch.no_grad()
    def compute(self, inputs: Tensor, weight: Quantised, bias: Tensor | None) -> Tensor:
        """The shipped layer: (..., I) -> (..., O) in the inputs' dtype."""
        if self.linear is not None:
            encoded = inputs if self.encode is None else self.encode(inputs)
            return self.linear(encoded, weight, bias, inputs.dtype)
        rounded = inputs if self.activation is None else self.activation(inputs)
        return self.product(rounded, self.restore(weight, inputs.dtype), bias)

    def product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of formats without a `linear` of their own, from round trips that are done."""
        if not self.bias_after or bias is None:
            return torch.nn.functional.linear(inputs, weight, bias)
        return torch.nn.functional.linear(inputs, weight) + bias


def grouped_by(weight: Tensor, group_size: int | None) -> Tensor:
    """(O, I) -> (O, G, group size)."""
    size = group_size or weight.shape[-1]
    return weight.reshape(*weight.shape[:-1], weight.shape[-1] // size, size)


def span_symmetric(quantised: Quantised, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """The range of a symmetric grid, from `low` to `high` steps: half a step beyond its last values."""
    scale = quantised.scale.float()
    return low * scale, torch.zeros_like(scale), high * scale


@torch.no_grad()
def range_gradient(numbers: Numbers, weight: Tensor, quantised: Quantised, factor: Tensor) -> tuple[Tensor, Tensor]:
    """How the restored weight moves with the range's factor, and which weights still move it themselves.

    The step size's gradient of LSQ (Esser et al. 2020, arXiv 1902.08153) for a range written as factor x (max - min),
    as in OmniQuant's learnable clipping (arXiv 2308.13137): inside the range a weight contributes its rounding error,
    outside of it the end of the range.

    Args:
        weight: (O, I) before quantisation, float32.
        factor: (O, G).

    Returns:
        d restored / d factor (O, I), float32, and the mask (O, I) of the weights that do not clip.
    """
    groups = factor.shape[-1]
    restored = numbers.restore(quantised, torch.float32).reshape(*weight.shape[:-1], groups, -1)
    grouped = weight.float().reshape(restored.shape)
    low, middle, high = (bound.unsqueeze(-1) for bound in numbers.span(quantised))
    # A factor of 1 spans the extremes: they lie on the border, from which the rounding of the scale may move it.
    inside = ((grouped >= low) & (grouped <= high)) | (factor >= 1).unsqueeze(-1)
    moves = (restored - torch.where(inside, grouped, middle)) / factor.float().unsqueeze(-1)
    return moves.reshape(weight.shape), inside.reshape(weight.shape)


@torch.no_grad()
def best_factor(numbers: Numbers, weight: Tensor, group_size: int | None, scale_dtype: torch.dtype) -> Tensor:
    """The factor of each group's range, out of 0.40, 0.42, ..., 1.10, with the least squared error of the weight.

    Args:
        weight: (O, I).

    Returns:
        (O, G) float32.
    """
    weight = weight.float()

    def squared_error(quantised: Quantised) -> Tensor:
        difference = numbers.restore(quantised, torch.float32) - weight
        return difference.square().reshape(*quantised.scale.shape, -1).sum(-1)

    least = squared_error(numbers.quantise(weight, group_size, scale_dtype, None))
    best = torch.ones_like(least)  # stays where nothing is better, as in a group of zeros
    for step in range(20, 56):
        factor = torch.full_like(best, step / 50)
        error = squared_error(numbers.quantise(weight, group_size, scale_dtype, factor))
        better = error < least
        best, least = torch.where(better, factor, best), torch.where(better, error, least)
    return best
