"""The linear layer of QAT with the adapter inside the fake quantiser: y = fq_a(x) fq_w(W + s B A)^T.

Gradients pass both round trips unchanged (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432), so that
no dense weight gradient is ever built (L4Q, arXiv 2402.04902):

    dX = dY Wq        dA = s (dY B)^T Xq        dB = s dY^T (Xq A^T)

Shapes: `O` out_features, `I` in_features, `R` rank; x is (..., I), A is (R, I), B is (O, R).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RoundTrip = Callable[[Tensor], Tensor]


@dataclass
class FakeQuantSwitch:
    """One switch for all layers of a model: whether quantisation is simulated at the moment, and where it ran."""

    enabled: bool = True
    seen: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class LayerNumerics:
    """What one layer needs to know about its format.

    Attributes:
        name: the layer's name without wrappers.
        weight: round trip of the merged weight (O, I).
        activation: round trip of the input, or None.
        merged_dtype: the dtype that the shipped 16-bit weight is rounded to before it is quantised.
        scaling: LoRA's s.
        switch: shared by all layers of the model.
    """

    name: str
    weight: RoundTrip
    activation: RoundTrip | None
    merged_dtype: torch.dtype
    scaling: float
    switch: FakeQuantSwitch


@torch.no_grad()
def merged_weight(
    weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, dtype: torch.dtype
) -> Tensor:
    """W + s B A, summed in fp32 and rounded once to `dtype`: the 16-bit weight that ships.

    Args:
        weight: (O, I). lora_a: (R, I) or None. lora_b: (O, R) or None.
    """
    if lora_a is None or lora_b is None:
        return weight.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scaling).to(dtype)


class FakeQuantLinear(torch.autograd.Function):
    """Forward with the shipped numbers, backward by the straight-through estimator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        bias: Tensor | None,
        numerics: LayerNumerics,
    ) -> Tensor:
        """(..., I) -> (..., O). `weight` may require a gradient (full fine-tuning); the adapters may be None."""
        device = x.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            shipped = merged_weight(weight, lora_a, lora_b, numerics.scaling, numerics.merged_dtype)
            inputs = x.to(compute)
            if numerics.switch.enabled:
                shipped = numerics.weight(shipped)
                inputs = numerics.activation(inputs) if numerics.activation is not None else inputs
                numerics.switch.seen.add(numerics.name)
            shipped = shipped.to(compute)
            output = torch.nn.functional.linear(inputs, shipped, None if bias is None else bias.to(compute))
        ctx.save_for_backward(inputs, shipped, lora_a, lora_b)
        ctx.scaling, ctx.x_dtype, ctx.weight_dtype = numerics.scaling, x.dtype, weight.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, A, B and bias; each only where it is asked for."""
        inputs, shipped, lora_a, lora_b = ctx.saved_tensors
        need_x, need_weight, need_a, need_b, need_bias, _ = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(shipped.dtype)
            rows = grad.reshape(-1, grad.shape[-1])  # (N, O)
            flat = inputs.reshape(-1, inputs.shape[-1])  # (N, I)
            grad_x = (grad @ shipped).to(ctx.x_dtype) if need_x else None
            grad_weight = (rows.t() @ flat).to(ctx.weight_dtype) if need_weight else None
            grad_a = grad_b = None
            if need_a:
                grad_a = ((rows @ lora_b.to(rows.dtype)).t() @ flat).to(lora_a.dtype) * ctx.scaling
            if need_b:
                grad_b = (rows.t() @ (flat @ lora_a.to(flat.dtype).t())).to(lora_b.dtype) * ctx.scaling
            grad_bias = rows.sum(0) if need_bias else None
        return grad_x, grad_weight, grad_a, grad_b, grad_bias, None
