"""The gradients of fake-quantised layers that share their inputs, by the straight-through estimator. See `qat.linear`.

Shapes: `N` tokens, `O` out_features, `I` in_features, `G` groups, `R` rank; A is (R, I), B is (O, R).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.kernels import merged_weight
from qat.layer import LayerNumerics, Projection
from quantize.numerics import range_gradient


def to_inputs(rows: Sequence[Tensor], shipped: Sequence[Tensor]) -> Tensor:
    """The gradient (N, I) of the shared input: the sum of dY (N, O) Wq (O, I)."""
    total = rows[0] @ shipped[0]
    for grad, weight in zip(rows[1:], shipped[1:], strict=True):
        total.addmm_(grad, weight)
    return total


def to_parameters(
    rows: Sequence[Tensor],
    flat: Tensor,
    projections: Sequence[Projection],
    numerics: Sequence[LayerNumerics],
    needs: Sequence[Any],
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of weight, A, B, bias and factor of each layer; each only where it is asked for.

    Args:
        rows: dY (N, O) of each layer. flat: their inputs (N, I), rounded.
    """
    adapters = _to_adapters(rows, flat, projections, numerics, needs)
    found: list[tuple[Tensor | None, ...]] = []
    for grad, projection, layer, need, (grad_a, grad_b) in zip(
        rows, projections, numerics, needs, adapters, strict=True
    ):
        weight, lora_a, lora_b, _, factor = projection
        grad_weight = grad_factor = None
        if factor is not None:
            dense, grad_factor = _through_range(layer, (grad.t() @ flat).float(), projection)
            grad_weight = dense.to(weight.dtype) if need.weight else None
            if need.lora_a and lora_a is not None and lora_b is not None:
                grad_a = (lora_b.float().t() @ dense).to(lora_a.dtype) * layer.scaling
            if need.lora_b and lora_a is not None and lora_b is not None:
                grad_b = (dense @ lora_a.float().t()).to(lora_b.dtype) * layer.scaling
        elif need.weight:
            grad_weight = (grad.t() @ flat).to(weight.dtype)
        grad_bias = grad.sum(0) if need.bias else None
        found.append((grad_weight, grad_a, grad_b, grad_bias, grad_factor if need.factor else None))
    return found


def _to_adapters(
    rows: Sequence[Tensor],
    flat: Tensor,
    projections: Sequence[Projection],
    numerics: Sequence[LayerNumerics],
    needs: Sequence[Any],
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Gradients of A and B of the layers whose ranges are fixed, the inputs read once for all of them."""
    chosen = [
        index
        for index, (projection, need) in enumerate(zip(projections, needs, strict=True))
        if projection.factor is None and (need.lora_a or need.lora_b)
    ]
    found: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(projections)
    if not chosen:
        return found
    ranks = [len(projections[index].lora_a) for index in chosen]  # type: ignore[arg-type]
    all_a: list[Tensor] = [projections[index].lora_a for index in chosen]  # type: ignore[misc]
    low_rank = flat @ (all_a[0] if len(all_a) == 1 else torch.cat(all_a)).to(flat.dtype).t()
    to_low_rank = torch.empty_like(low_rank)
    parts = zip(chosen, low_rank.split_with_sizes(ranks, 1), to_low_rank.split_with_sizes(ranks, 1), strict=True)
    grads_b: list[Tensor | None] = []
    for index, part, to_part in parts:
        lora_b, scaling = projections[index].lora_b, numerics[index].scaling
        assert lora_b is not None
        to_part.addmm_(rows[index], lora_b.to(flat.dtype), beta=0, alpha=scaling)
        grad_b = torch.empty_like(lora_b, dtype=flat.dtype)
        grads_b.append(grad_b.addmm_(rows[index].t(), part, beta=0, alpha=scaling) if needs[index].lora_b else None)
    grads_a = (to_low_rank.t() @ flat).split_with_sizes(ranks)
    for index, grad_a, found_b in zip(chosen, grads_a, grads_b, strict=True):
        found[index] = grad_a if needs[index].lora_a else None, found_b  # autograd casts to their parameter's dtype
    return found


def _through_range(numerics: LayerNumerics, dense: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """The dense gradient (O, I) without the weights that clip, and the gradient (O, G) of the range's factor."""
    weight, lora_a, lora_b, _, factor = projection
    assert factor is not None
    merged = merged_weight(weight, lora_a, lora_b, numerics.scaling)
    moves, inside = range_gradient(numerics.numbers, merged, numerics.quantise(weight, lora_a, lora_b), factor)
    grad_factor = (dense * moves).reshape(*factor.shape, -1).sum(-1).to(factor.dtype)
    return dense * inside, grad_factor
