"""The linear layers of QAT with the adapter inside the fake quantiser: y = fq_a(x) fq_w(W + s B A)^T.

Gradients pass both round trips unchanged (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432), so that
no dense weight gradient is ever built (L4Q, arXiv 2402.04902):

    dX = dY Wq        dA = s (dY B)^T Xq        dB = s dY^T (Xq A^T)

Only where the range of a group has a factor of its own does the format clip, and then the dense gradient is needed: to
leave out the weights that clip, and to move the factor. It lives within one layer's backward pass.

Layers that share an input (q, k and v; gate and up) are one function of it: the input is rounded once, kept once, and
its products with all their adapters are one. A gated MLP is one function too, which keeps what LoRA's own keeps.

Shapes: `N` tokens, `O` out_features, `I` in_features, `G` groups, `R` rank; x is (..., I), A is (R, I), B is (O, R).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.cache import Weight
from qat.function import (
    NoAutocast,
    compute_dtype,
    fake_quant_weights,
    projections_of,
    restored_weights,
    save_for_backward,
    saved,
)
from qat.gradients import to_inputs, to_parameters
from qat.kernels import Path
from qat.layer import LayerNumerics, Projection
from quantize.numerics import Quantised


def fake_quant_linears(
    x: Tensor, projections: Sequence[Projection], numerics: Sequence[LayerNumerics]
) -> tuple[Tensor, ...]:
    """x (..., I) through layers that share it: one output (..., O) each."""
    tensors = [tensor for projection in projections for tensor in projection]
    outputs: tuple[Tensor, ...] = _Linears.apply(x, tuple(numerics), *tensors)
    return outputs


def fake_quant_linear(x: Tensor, projection: Projection, numerics: LayerNumerics) -> Tensor:
    """x (..., I) through one layer: (..., O)."""
    return fake_quant_linears(x, (projection,), (numerics,))[0]


def fake_quant_swiglu(x: Tensor, projections: Sequence[Projection], numerics: Sequence[LayerNumerics]) -> Tensor:
    """x (..., I) through gate, up and down: down(silu(gate(x)) * up(x))."""
    tensors = [tensor for projection in projections for tensor in projection]
    output: Tensor = _SwiGLU.apply(x, tuple(numerics), *tensors)
    return output


class _Linears(torch.autograd.Function):
    """Forward with the shipped numbers, backward by the straight-through estimator."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numerics: tuple[LayerNumerics, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        projections = projections_of(tensors)
        compute = compute_dtype(x, projections[0].weight)
        path = numerics[0].path(projections[0].weight, compute)
        with NoAutocast(x.device.type):
            inputs = path.inputs(x.to(compute))
            weights = fake_quant_weights(path, projections, numerics, compute)
            outputs = _products(path, inputs, _each(weights, projections), projections, compute)
        save_for_backward(ctx, path, (inputs,), projections, weights, numerics)
        ctx.x_dtype, ctx.compute = x.dtype, compute
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), projections, weights = saved(ctx)
        with NoAutocast(grads[0].device.type):
            rows = [_rows(grad.to(ctx.compute)) for grad in grads]
            grad_x = None
            if ctx.needs_input_grad[0]:
                shipped = restored_weights(ctx.path, weights, projections, ctx.numerics, ctx.compute)
                grad_x = to_inputs(rows, _each(shipped, projections))
                del shipped
            flat = _rows(ctx.path.restored_inputs(inputs, ctx.compute))
            needs = projections_of(ctx.needs_input_grad[2:])
            found = to_parameters(rows, flat, projections, ctx.numerics, needs)
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).reshape(*grads[0].shape[:-1], grad_x.shape[-1])
        return (grad_x, None, *(grad for projection in found for grad in projection))


class _SwiGLU(torch.autograd.Function):
    """A gated MLP. Of what lies between x and the output it keeps gate and up alone, as LoRA's fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerics: tuple[LayerNumerics, ...], *tensors: Tensor | None) -> Tensor:
        projections = projections_of(tensors)
        compute = compute_dtype(x, projections[0].weight)
        path = numerics[0].path(projections[0].weight, compute)
        with NoAutocast(x.device.type):
            inputs = path.inputs(x.to(compute))
            weights = fake_quant_weights(path, projections[:2], numerics[:2], compute)
            if len(weights) == 1:  # one product gives both
                bias = _joined_bias(projections[:2], compute)
                halves = [path.product(inputs, weights[0], bias, compute)]
            else:
                halves = _products(path, inputs, weights, projections[:2], compute)
            hidden = path.swiglu(*_gate_and_up(halves, projections))
            last = fake_quant_weights(path, projections[2:], numerics[2:], compute)
            (output,) = _products(path, hidden, last, projections[2:], compute)
        save_for_backward(ctx, path, (inputs, *halves), projections, [*last, *weights], numerics)
        ctx.x_dtype, ctx.compute, ctx.spent = x.dtype, compute, False
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "a fake-quantised MLP computes its gradients in place, once: "
                "compute the forward pass again instead of backward with retain_graph=True"
            )
        ctx.spent = True
        path, compute, numerics = ctx.path, ctx.compute, ctx.numerics
        (inputs, *others), projections, weights = saved(ctx)
        halves = [half for half in others if isinstance(half, Tensor)]
        first, last = weights[1:], weights[:1]
        needs = projections_of(ctx.needs_input_grad[2:])
        with NoAutocast(grad.device.type):
            rows = [_rows(grad.to(compute))]
            gate, up = _gate_and_up(halves, projections)
            (shipped,) = restored_weights(path, last, projections[2:], numerics[2:], compute)
            to_hidden = to_inputs(rows, [shipped]).reshape(gate.shape)
            del shipped
            hidden = path.swiglu_backward_(gate, up, to_hidden)  # gate and up are their gradients from here on
            flat = _rows(path.restored_inputs(hidden, compute))
            found_last = to_parameters(rows, flat, projections[2:], numerics[2:], needs[2:])
            del to_hidden, hidden, flat
            grad_x = None
            if ctx.needs_input_grad[0]:
                restored = restored_weights(path, first, projections[:2], numerics[:2], compute)
                grad_x = to_inputs([_rows(half) for half in halves], restored)
                del restored
            flat = _rows(path.restored_inputs(inputs, compute))
            rows = [_rows(gate), _rows(up)]
            found = to_parameters(rows, flat, projections[:2], numerics[:2], needs[:2])
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).reshape(*grad.shape[:-1], grad_x.shape[-1])
        return (grad_x, None, *(grad for projection in (*found, *found_last) for grad in projection))


def _rows(values: Tensor) -> Tensor:
    """(..., I) -> (N, I)."""
    return values.reshape(-1, values.shape[-1])


def _products(
    path: Path, inputs: Weight, weights: Sequence[Weight], projections: Sequence[Projection], compute: torch.dtype
) -> list[Tensor]:
    """The outputs of layers that share their inputs."""
    outputs = []
    for weight, projection in zip(weights, projections, strict=True):
        bias = None if projection.bias is None else projection.bias.to(compute)
        outputs.append(path.product(inputs, weight, bias, compute))
    return outputs


def _joined_bias(projections: Sequence[Projection], compute: torch.dtype) -> Tensor | None:
    if all(projection.bias is None for projection in projections):
        return None
    rows = [projection.weight.shape[0] for projection in projections]
    zeros = [projections[0].weight.new_zeros(count, dtype=compute) for count in rows]
    return torch.cat([b if p.bias is None else p.bias.to(compute) for p, b in zip(projections, zeros, strict=True)])


def _each(weights: Sequence[Any], projections: Sequence[Projection]) -> list[Any]:
    """The weight of each layer, where one may hold all."""
    if len(weights) == len(projections):
        return list(weights)
    (joined,) = weights
    rows = [projection.weight.shape[0] for projection in projections]
    if isinstance(joined, Tensor):
        return list(joined.split_with_sizes(rows))
    values, scales = joined.values.split_with_sizes(rows), joined.scale.split_with_sizes(rows)
    return [Quantised(value, scale) for value, scale in zip(values, scales, strict=True)]


def _gate_and_up(halves: Sequence[Tensor], projections: Sequence[Projection]) -> tuple[Tensor, Tensor]:
    """Views of the one product that gave both, or the two products."""
    if len(halves) == 2:
        return halves[0], halves[1]
    rows = projections[0].weight.shape[0]
    return halves[0][..., :rows], halves[0][..., rows:]
