"""All experts of a layer at once: tokens sorted by expert, one rounding launch and one grouped product a matrix.

What transformers' `grouped_mm` does with the plain weights. The loop of `qat.experts` computes the same function expert
by expert, in some launches each, which costs a GPU more than the products themselves.

Shapes: `N` tokens, `K` experts a token, `M` = N K, `E` experts, `O` out_features, `I` in_features, `R` rank; the
experts' weights lie one below the other: W (E O, I), A (E R, I), B (E O, R).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qat.function import NoAutocast, compute_dtype, fake_quant_weights, restored_weights, save_for_backward, saved
from qat.layer import LayerNumerics, Projection
from quantize.numerics import Quantised

ALIGNED = 8
"""Values of 16 bit that the rows of a grouped product's operands must be a multiple of."""

GroupedProduct = Callable[[Tensor, Tensor], Tensor]
"""(inputs (M, I) sorted by expert, ends (E,)) -> (M, O)."""


@dataclass(frozen=True)
class Routing:
    """Where each token's rows lie when they are sorted by expert.

    Attributes:
        order: (M,) the (token, choice) of each sorted row, as token * K + choice.
        inverse: (M,) the sorted row of each (token, choice).
        ends: (E,) int32, rows up to the last of each expert.
        choices: K.
    """

    order: Tensor
    inverse: Tensor
    ends: Tensor
    choices: int

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Routing:
        """Of the experts (N, K) that a router chose."""
        found, order = torch.sort(chosen.reshape(-1), stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        numbers = torch.arange(experts, device=found.device, dtype=found.dtype)
        ends = torch.searchsorted(found, numbers, right=True, out_int32=True)
        return cls(order, inverse, ends, chosen.shape[-1])


def apply_together(
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    experts: int,
    products: Mapping[str, GroupedProduct],
    gated: Callable[[Tensor], Tensor],
) -> Tensor:
    """`quantize.experts.apply_experts` with products of all experts at once; the sum over a token's is in its order.

    Args:
        hidden: (N, I). chosen: (N, K) expert of each token, all below `experts`: on one device there is no other.
            weights: (N, K) what its output counts.
        products: "gate_up_proj" and "down_proj" -> their product.
        gated: the activation: (M, 2 F) -> (M, F).
    """
    routing = Routing.of(chosen, experts)
    rows: Tensor = _Sorted.apply(hidden, routing.order, routing.inverse, routing.choices)
    inner = gated(products["gate_up_proj"](rows, routing.ends))
    found: Tensor = _Unsorted.apply(products["down_proj"](inner, routing.ends), routing.order, routing.inverse)
    weighted = found.reshape(*chosen.shape, -1) * weights.unsqueeze(-1)
    return weighted.sum(1).to(hidden.dtype)


def suits(weight: Tensor, numerics: LayerNumerics | None, compute: torch.dtype) -> bool:
    """Whether the experts' weights (E, O, I) can be multiplied at once: where the GPU and the format have kernels.

    Args:
        numerics: None where the weights keep 16 bit.
    """
    if not weight.is_cuda or {weight.dtype, compute} != {torch.bfloat16}:
        return False
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (9, 0) or any(size % 16 for size in weight.shape[1:]):
        return False
    if numerics is None:
        return True
    return numerics.factor is None and numerics.path(weight, compute).takes_experts(capability)


def fake_quant_product(projection: Projection, numerics: LayerNumerics) -> GroupedProduct:
    """The product with the weights as they ship, the adapters inside. `numerics.experts` is E."""
    weight, lora_a, lora_b, _, _ = projection
    return lambda rows, ends: _Grouped.apply(rows, ends, numerics, weight, lora_a, lora_b)


def plain_product(weight: Tensor) -> GroupedProduct:
    """The product with weights (E, O, I) as they are."""
    return lambda rows, ends: _grouped_mm(rows.to(weight.dtype), weight.mT, ends)


def adapter_product(lora_a: Tensor, lora_b: Tensor, scaling: float, experts: int, dtype: torch.dtype) -> GroupedProduct:
    """What the adapters add where they are outside: s (x A^T) B^T."""
    inner, outer = map(plain_product, _each_adapter(lora_a, lora_b, experts, dtype))
    return lambda rows, ends: outer(inner(rows, ends), ends) * scaling


class _Sorted(torch.autograd.Function):
    """(N, I) -> (M, I): each token once for each of its experts, sorted by them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(inverse)  # not on ctx: a checkpoint that computes again may route a tie otherwise
        ctx.choices = choices
        return hidden.index_select(0, order // choices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        each = grad.index_select(0, inverse)
        return each.reshape(-1, ctx.choices, each.shape[-1]).sum(1), None, None, None


class _Unsorted(torch.autograd.Function):
    """(M, O) sorted by expert -> (M, O) by token."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


class _Grouped(torch.autograd.Function):
    """`qat.linear`'s function of one layer, for all experts of a matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        ends: Tensor,
        numerics: LayerNumerics,
        weight: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
    ) -> Tensor:
        projection = Projection(weight, lora_a, lora_b, None, None)
        compute = compute_dtype(rows, weight)
        path = numerics.path(weight, compute)
        with NoAutocast(rows.device.type):
            inputs = path.inputs(rows.to(compute))
            weights = fake_quant_weights(path, [projection], [numerics], compute)
            output = _product(inputs, weights[0], ends, numerics.experts, compute)
        save_for_backward(ctx, path, (inputs, ends), [projection], weights, (numerics,))
        ctx.dtype, ctx.compute = rows.dtype, compute
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inputs, ends), (projection,), weights = saved(ctx)
        assert isinstance(ends, Tensor)
        path, numerics, compute = ctx.path, ctx.numerics[0], ctx.compute
        by_expert = numerics.experts, -1
        _, _, _, needs_weight, needs_a, needs_b = ctx.needs_input_grad
        grad_rows = grad_weight = None
        with NoAutocast(grad.device.type):
            grad = grad.to(compute).contiguous()
            if ctx.needs_input_grad[0]:
                (shipped,) = restored_weights(path, weights, [projection], ctx.numerics, compute)
                grad_rows = _grouped_mm(grad, shipped.reshape(*by_expert, shipped.shape[-1]), ends).to(ctx.dtype)
                del shipped
            flat = path.restored_inputs(inputs, compute)
            if needs_weight:
                grad_weight = _grouped_mm(grad.t(), flat, ends).flatten(0, 1).to(projection.weight.dtype)
            grad_a = grad_b = None
            if projection.lora_a is not None and projection.lora_b is not None and (needs_a or needs_b):
                grad_a, grad_b = _to_adapters(grad, flat, projection.lora_a, projection.lora_b, numerics, ends)
        return grad_rows, None, None, grad_weight, grad_a if needs_a else None, grad_b if needs_b else None


def _product(inputs: Any, weight: Any, ends: Tensor, experts: int, compute: torch.dtype) -> Tensor:
    """(M, O): the shipped product, of restored operands or of float8 with both scales after the sum."""
    if isinstance(weight, Tensor):
        return _grouped_mm(inputs, weight.reshape(experts, -1, weight.shape[-1]).mT, ends)
    assert isinstance(inputs, Quantised)
    return torch._scaled_grouped_mm(
        inputs.values,
        weight.values.reshape(experts, -1, weight.values.shape[-1]).mT,
        inputs.scale.reshape(-1),
        weight.scale.reshape(experts, -1),
        offs=ends,
        out_dtype=compute,
        use_fast_accum=True,
    )


def _to_adapters(
    grad: Tensor, flat: Tensor, lora_a: Tensor, lora_b: Tensor, numerics: LayerNumerics, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of A (E R, I) and B (E O, R): dA = s (dY B)^T Xq, dB = s dY^T (Xq A^T), expert by expert."""
    rank = lora_b.shape[-1]
    each_a, each_b = _each_adapter(lora_a, lora_b, numerics.experts, flat.dtype)
    low_rank = _grouped_mm(flat, each_a.mT, ends)
    to_low_rank = _grouped_mm(grad, each_b, ends)
    grad_b = _grouped_mm(grad.t(), low_rank, ends)[..., :rank] * numerics.scaling
    grad_a = _grouped_mm(to_low_rank.t(), flat, ends)[:, :rank] * numerics.scaling
    return grad_a.reshape(lora_a.shape), grad_b.reshape(lora_b.shape)


def _each_adapter(lora_a: Tensor, lora_b: Tensor, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (E, R, I) and B (E, O, R), their rank filled up with zeros to what a grouped product takes."""
    rank = lora_b.shape[-1]
    more = -rank % ALIGNED
    each_a = pad(lora_a.to(dtype).reshape(experts, rank, -1), (0, 0, 0, more))
    return each_a, pad(lora_b.to(dtype).reshape(experts, -1, rank), (0, more))


def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """(M, I) (E, I, O) -> (M, O), or (O, M) (M, I) -> (E, O, I)."""
    return torch.nn.functional.grouped_mm(left, right, offs=ends)
