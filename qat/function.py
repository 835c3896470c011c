"""What the autograd functions of fake-quantised layers share: the weights that they multiply, and what they keep.

Shapes: `O` out_features, `I` in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.cache import Weight
from qat.kernels import Path
from qat.layer import LayerNumerics, Projection
from quantize.numerics import Quantised

_FIELDS = len(Projection._fields)


def projections_of(tensors: Sequence[Any]) -> list[Projection]:
    """The layers whose tensors (or what else there is of each) follow each other."""
    return [Projection(*tensors[start : start + _FIELDS]) for start in range(0, len(tensors), _FIELDS)]


class NoAutocast:
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


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a layer computes in: what autocast asks for, else its weight's own dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def fake_quant_weights(
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


def _backward_is_near() -> bool:
    """Gradient checkpointing: the layer is computed for the second time, or what it saves is dropped until then."""
    return torch._C._current_graph_task_id() != -1 or bool(torch._C._autograd._top_saved_tensors_default_hooks(False))


def save_for_backward(
    ctx: Any,
    path: Path,
    inputs: tuple[Weight, ...],
    projections: Sequence[Projection],
    weights: Sequence[Weight],
    numerics: tuple[LayerNumerics, ...],
) -> None:
    """Keeps a function's inputs and parameters, and its weights unless making them again saves memory."""
    kept = weights if numerics[0].keep or _backward_is_near() else ()
    tensors = [tensor for item in (*inputs, *kept) for tensor in _parts(item)]
    parameters = [tensor for projection in projections for tensor in projection]
    ctx.save_for_backward(*parameters, *tensors)
    ctx.numerics, ctx.path = numerics, path
    ctx.counts = len(parameters), [len(_parts(item)) for item in inputs], [len(_parts(item)) for item in kept]


def _parts(item: Weight) -> tuple[Tensor | None, ...]:
    return (item,) if isinstance(item, Tensor) else (item.values, item.scale, item.zero, item.tensor_scale)


def saved(ctx: Any) -> tuple[list[Weight], list[Projection], list[Weight]]:
    """What `save_for_backward` saved; no weights where they were not kept."""
    count, inputs, weights = ctx.counts
    tensors = ctx.saved_tensors
    rest = iter(tensors[count:])

    def take(parts: int) -> Weight:
        found = [next(rest) for _ in range(parts)]
        return found[0] if parts == 1 else Quantised(*found)

    return [take(parts) for parts in inputs], projections_of(tensors[:count]), [take(parts) for parts in weights]


def restored_weights(
    path: Path,
    weights: Sequence[Weight],
    projections: Sequence[Projection],
    numerics: Sequence[LayerNumerics],
    compute: torch.dtype,
) -> list[Tensor]:
    """The restored weights (O, I), made again where they were not kept; as many as `fake_quant_weights` gives."""
    found = weights or fake_quant_weights(path, projections, numerics, compute)
    return [path.restored_weight(weight, numerics[0].dtype, compute) for weight in found]
