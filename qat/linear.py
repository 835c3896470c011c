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


_FIELDS = len(Projection._fields)


def _projections(tensors: Sequence[Tensor | None]) -> list[Projection]:
    return [Projection(*tensors[start : start + _FIELDS]) for start in range(0, len(tensors), _FIELDS)]  # type: ignore[arg-type]


class _Linears(torch.autograd.Function):
    """Forward with the shipped numbers, backward by the straight-through estimator."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numerics: tuple[LayerNumerics, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        projections = _projections(tensors)
        compute = _compute_dtype(x, projections[0].weight)
        path = numerics[0].path(projections[0].weight, compute)
        with _NoAutocast(x.device.type):
            inputs = path.inputs(x.to(compute))
            weights = _weights(path, projections, numerics, compute)
            outputs = _products(path, inputs, _each(weights, projections), projections, compute)
        _save(ctx, path, (inputs,), projections, weights, numerics)
        ctx.x_dtype, ctx.compute = x.dtype, compute
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), projections, weights = _saved(ctx)
        with _NoAutocast(grads[0].device.type):
            rows = [_rows(grad.to(ctx.compute)) for grad in grads]
            grad_x = None
            if ctx.needs_input_grad[0]:
                shipped = _restored(ctx.path, weights, projections, ctx.numerics, ctx.compute)
                grad_x = to_inputs(rows, _each(shipped, projections))
                del shipped
            flat = _rows(ctx.path.restored_inputs(inputs, ctx.compute))
            needs = _projections(ctx.needs_input_grad[2:])
            found = to_parameters(rows, flat, projections, ctx.numerics, needs)
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).reshape(*grads[0].shape[:-1], grad_x.shape[-1])
        return (grad_x, None, *(grad for projection in found for grad in projection))


class _SwiGLU(torch.autograd.Function):
    """A gated MLP. Of what lies between x and the output it keeps gate and up alone, as LoRA's fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerics: tuple[LayerNumerics, ...], *tensors: Tensor | None) -> Tensor:
        projections = _projections(tensors)
        compute = _compute_dtype(x, projections[0].weight)
        path = numerics[0].path(projections[0].weight, compute)
        with _NoAutocast(x.device.type):
            inputs = path.inputs(x.to(compute))
            weights = _weights(path, projections[:2], numerics[:2], compute)
            if len(weights) == 1:  # one product gives both
                bias = _joined_bias(projections[:2], compute)
                halves = [path.product(inputs, weights[0], bias, compute)]
            else:
                halves = _products(path, inputs, weights, projections[:2], compute)
            hidden = path.swiglu(*_gate_and_up(halves, projections))
            last = _weights(path, projections[2:], numerics[2:], compute)
            (output,) = _products(path, hidden, last, projections[2:], compute)
        _save(ctx, path, (inputs, *halves), projections, [*last, *weights], numerics)
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
        (inputs, *saved), projections, weights = _saved(ctx)
        halves = [half for half in saved if isinstance(half, Tensor)]
        first, last = weights[1:], weights[:1]
        needs = _projections(ctx.needs_input_grad[2:])
        with _NoAutocast(grad.device.type):
            rows = [_rows(grad.to(compute))]
            gate, up = _gate_and_up(halves, projections)
            (shipped,) = _restored(path, last, projections[2:], numerics[2:], compute)
            to_hidden = to_inputs(rows, [shipped]).reshape(gate.shape)
            del shipped
            hidden = path.swiglu_backward_(gate, up, to_hidden)  # gate and up are their gradients from here on
            flat = _rows(path.restored_inputs(hidden, compute))
            found_last = to_parameters(rows, flat, projections[2:], numerics[2:], needs[2:])
            del to_hidden, hidden, flat
            grad_x = None
            if ctx.needs_input_grad[0]:
                restored = _restored(path, first, projections[:2], numerics[:2], compute)
                grad_x = to_inputs([_rows(half) for half in halves], restored)
                del restored
            flat = _rows(path.restored_inputs(inputs, compute))
            rows = [_rows(gate), _rows(up)]
            found = to_parameters(rows, flat, projections[:2], numerics[:2], needs[:2])
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).reshape(*grad.shape[:-1], grad_x.shape[-1])
        return (grad_x, None, *(grad for projection in (*found, *found_last) for grad in projection))


class _NoAutocast:
    """`torch.autocast(device, enabled=False)` in a tenth of the CPU's time."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.enabled = torch.is_autocast_enabled(self.device)
        if self.enabled:
            torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            torch.set_autocast_enabled(self.device, True)


def _rows(values: Tensor) -> Tensor:
    """(..., I) -> (N, I)."""
    return values.reshape(-1, values.shape[-1])


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


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


def _weights(
    path: Path, projections: Sequence[Projection], numerics: Sequence[LayerNumerics], compute: torch.dtype
) -> list[Weight]:
    """The weights that the product takes: one for each layer, or one for all of them together."""

    def make() -> list[Weight]:
        layers = [
            layer.layer(part.weight, part.lora_a, part.lora_b, part.factor)
            for part, layer in zip(projections, numerics, strict=True)
        ]
        return path.weights(layers, compute)

    parts = [tensor for part in projections for tensor in (part.weight, part.lora_a, part.lora_b, part.factor)]
    return numerics[0].cache.get(numerics[0].name, parts, (compute, path), make)


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


# ---------------------------------------------------------------------- what is kept for backward


def _backward_is_near() -> bool:
    """Gradient checkpointing: the layer is computed for the second time, or what it saves is dropped until then."""
    return torch._C._current_graph_task_id() != -1 or bool(torch._C._autograd._top_saved_tensors_default_hooks(False))


def _save(
    ctx: Any,
    path: Path,
    inputs: tuple[Weight, ...],
    projections: Sequence[Projection],
    weights: Sequence[Weight],
    numerics: tuple[LayerNumerics, ...],
) -> None:
    kept = weights if numerics[0].keep or _backward_is_near() else ()
    tensors = [tensor for item in (*inputs, *kept) for tensor in _parts(item)]
    parameters = [tensor for projection in projections for tensor in projection]
    ctx.save_for_backward(*parameters, *tensors)
    ctx.numerics, ctx.path = numerics, path
    ctx.counts = len(parameters), [len(_parts(item)) for item in inputs], [len(_parts(item)) for item in kept]


def _parts(item: Weight) -> tuple[Tensor | None, ...]:
    return (item,) if isinstance(item, Tensor) else (item.values, item.scale, item.zero, item.tensor_scale)


def _saved(ctx: Any) -> tuple[list[Weight], list[Projection], list[Weight]]:
    """What `_save` saved; no weights where they were not kept."""
    count, inputs, weights = ctx.counts
    tensors = ctx.saved_tensors
    rest = iter(tensors[count:])

    def take(parts: int) -> Weight:
        found = [next(rest) for _ in range(parts)]
        return found[0] if parts == 1 else Quantised(*found)

    return [take(parts) for parts in inputs], _projections(tensors[:count]), [take(parts) for parts in weights]


def _restored(
    path: Path,
    weights: Sequence[Weight],
    projections: Sequence[Projection],
    numerics: Sequence[LayerNumerics],
    compute: torch.dtype,
) -> list[Tensor]:
    """The restored weights (O, I), made again where they were not kept; as many as `_weights` gives."""
    found = weights or _weights(path, projections, numerics, compute)
    return [path.restored_weight(weight, numerics[0].dtype, compute) for weight in found]
