"""The linear layer of QAT with the adapter inside the fake quantiser: y = fq_a(x) fq_w(W + s B A)^T.

Gradients pass both round trips unchanged (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432), so that
no dense weight gradient is ever built (L4Q, arXiv 2402.04902):

    dX = dY Wq        dA = s (dY B)^T Xq        dB = s dY^T (Xq A^T)

Only where the range of a group has a factor of its own does the format clip, and then the dense gradient is needed: to
leave out the weights that clip, and to move the factor. It lives within one layer's backward pass.

Shapes: `O` out_features, `I` in_features, `G` groups, `R` rank; x is (..., I), A is (R, I), B is (O, R).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.numerics import Numbers, Quantised, range_gradient


@dataclass(frozen=True, kw_only=True)
class LayerNumerics:
    """What one layer needs to know about its format.

    Attributes:
        name: the layer's name without wrappers.
        numbers: the format's numbers.
        group_size: weights per scale; None = one scale a row.
        dtype: what the shipped layer computes in; its scales have it too.
        scaling: LoRA's s.
        calls: counts, by layer name, how often fake quantisation ran; shared by all layers of the model.
        factor: (O, G) multiplies each group's range; learned where it requires a gradient. None: 1, exactly.
    """

    name: str
    numbers: Numbers
    group_size: int | None
    dtype: torch.dtype
    scaling: float
    calls: Counter[str]
    factor: Tensor | None = None

    def quantise(self, merged: Tensor) -> Quantised:
        """The merged weight (O, I) on the grid that ships."""
        factor = None if self.factor is None else self.factor.detach()
        return self.numbers.quantise(merged, self.group_size, self.dtype, factor)


@torch.no_grad()
def merged_weight(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
    """W + s B A in float32, of which the grid's integers are chosen; W itself where there is no adapter.

    A bf16 sum would hide every adapter that moves a weight by less than half a step of bf16.

    Args:
        weight: (O, I). lora_a: (R, I) or None. lora_b: (O, R) or None.
    """
    if lora_a is None or lora_b is None:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scaling)


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
        factor: Tensor | None,
        numerics: LayerNumerics,
    ) -> Tensor:
        """(..., I) -> (..., O). `weight` may require a gradient (full fine-tuning); the adapters may be None.

        `factor` is `numerics.factor`, named apart so that it can receive a gradient.
        """
        device, numbers = x.device.type, numerics.numbers
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            quantised = numerics.quantise(merged_weight(weight, lora_a, lora_b, numerics.scaling))
            shipped = numbers.restore(quantised, numerics.dtype).to(compute)
            raw, bias = x.to(compute), None if bias is None else bias.to(compute)
            inputs = raw if numbers.activation is None else numbers.activation(raw)
            if numbers.linear is not None:
                output = numbers.linear(raw, quantised, bias)
            else:
                output = numbers.product(inputs, shipped, bias)
        numerics.calls[numerics.name] += 1
        ctx.save_for_backward(inputs, shipped, lora_a, lora_b, *((weight, factor) if factor is not None else ()))
        ctx.numerics, ctx.x_dtype, ctx.weight_dtype = numerics, x.dtype, weight.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, A, B, bias and factor; each only where it is asked for."""
        inputs, shipped, lora_a, lora_b, *ranged = ctx.saved_tensors
        need_x, need_weight, need_a, need_b, need_bias, need_factor, _ = ctx.needs_input_grad
        scaling = ctx.numerics.scaling
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(shipped.dtype)
            rows = grad.reshape(-1, grad.shape[-1])  # (N, O)
            flat = inputs.reshape(-1, inputs.shape[-1])  # (N, I)
            grad_x = (grad @ shipped).to(ctx.x_dtype) if need_x else None
            grad_bias = rows.sum(0) if need_bias else None
            grad_weight = grad_a = grad_b = grad_factor = None
            if ranged:
                dense, grad_factor = _through_range(ctx.numerics, (rows.t() @ flat).float(), lora_a, lora_b, *ranged)
                grad_weight = dense.to(ctx.weight_dtype) if need_weight else None
                grad_a = (lora_b.float().t() @ dense).to(lora_a.dtype) * scaling if need_a else None
                grad_b = (dense @ lora_a.float().t()).to(lora_b.dtype) * scaling if need_b else None
            else:
                grad_weight = (rows.t() @ flat).to(ctx.weight_dtype) if need_weight else None
                if need_a:
                    grad_a = ((rows @ lora_b.to(rows.dtype)).t() @ flat).to(lora_a.dtype) * scaling
                if need_b:
                    grad_b = (rows.t() @ (flat @ lora_a.to(flat.dtype).t())).to(lora_b.dtype) * scaling
        return grad_x, grad_weight, grad_a, grad_b, grad_bias, grad_factor if need_factor else None, None


def _through_range(
    numerics: LayerNumerics,
    dense: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    weight: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor]:
    """The dense gradient (O, I) without the weights that clip, and the gradient (O, G) of the range's factor."""
    merged = merged_weight(weight, lora_a, lora_b, numerics.scaling)
    moves, inside = range_gradient(numerics.numbers, merged, numerics.quantise(merged), factor)
    grad_factor = (dense * moves).reshape(*factor.shape, -1).sum(-1).to(factor.dtype)
    return dense * inside, grad_factor
