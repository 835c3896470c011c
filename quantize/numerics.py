"""Round trips `dequantize(quantize(x))` of the shipped formats, in plain torch.

These functions are the numbers of a format: training runs them as fake quantisers, and tests show that they equal the
real torchao tensors bit for bit. Shapes: `O` out_features, `I` in_features, `G` groups (I / group size).

Each function takes a floating tensor and returns one of the same shape and dtype. None of them builds a graph; the
straight-through estimator is added by `qat.linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_RANGE = (-128, 127)
FP8_MAX = 448.0  # largest finite float8_e4m3fn


@torch.no_grad()
def int_symmetric_per_group(weight: Tensor, group_size: int, bits: int) -> Tensor:
    """Symmetric signed integers with one scale per group of `group_size` neighbouring inputs.

    The scale maps the larger of `-min / 2^(b-1)` and `max / (2^(b-1) - 1/2)` on the grid, as torchao's
    `IntxUnpackedToInt8Tensor` (`MappingType.SYMMETRIC`): the scale is `max|w| / ((qmax - qmin) / 2)`.

    Args:
        weight: (O, I) with I divisible by `group_size`.
        group_size: inputs that share a scale; I itself gives one scale per output row.
        bits: width of the integer, 2 to 8.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grouped = weight.reshape(*weight.shape[:-1], -1, group_size)  # (O, G, group_size)
    negative = torch.clamp(grouped.amin(dim=-1, keepdim=True), max=0)
    positive = torch.clamp(grouped.amax(dim=-1, keepdim=True), min=0)
    scale = torch.maximum(-negative, positive) / (float(high - low) / 2)
    scale = torch.clamp(scale, min=torch.finfo(weight.dtype).smallest_normal).to(weight.dtype)
    quantised = torch.clamp(torch.round(grouped * (1.0 / scale)), low, high)
    return (quantised * scale).to(weight.dtype).reshape(weight.shape)


@torch.no_grad()
def int8_asymmetric_per_token(activation: Tensor) -> Tensor:
    """Asymmetric int8 with one scale and zero point per token, chosen from that token (dynamic quantisation).

    Args:
        activation: (..., I).
    """
    low, high = INT8_RANGE
    negative = torch.clamp(activation.amin(dim=-1, keepdim=True), max=0)
    positive = torch.clamp(activation.amax(dim=-1, keepdim=True), min=0)
    scale = (positive - negative) / float(high - low)
    scale = torch.clamp(scale, min=torch.finfo(activation.dtype).smallest_normal)
    zero_point = torch.clamp(low - torch.round(negative / scale), low, high).to(torch.int8)
    scale = scale.to(activation.dtype)
    quantised = torch.clamp(torch.round(activation * (1.0 / scale)) + zero_point, low, high)
    return ((quantised - zero_point) * scale).to(activation.dtype)


@torch.no_grad()
def fp8_per_row(values: Tensor) -> Tensor:
    """float8_e4m3fn with one fp32 scale per row (weights) or token (activations): `max|x| / 448`.

    Args:
        values: (..., I). A row of zeros stays zero, where the plain formula would divide 0 by 0.
    """
    scale = (values.abs().amax(dim=-1, keepdim=True) / FP8_MAX).to(torch.float32)
    scaled = (values.to(torch.float32) / scale).clamp(-FP8_MAX, FP8_MAX)
    restored = scaled.to(torch.float8_e4m3fn).to(torch.float32) * scale
    return torch.where(scale == 0, torch.zeros_like(restored), restored).to(values.dtype)


@torch.no_grad()
def int4_tinygemm(weight: Tensor, group_size: int) -> Tensor:
    """Asymmetric uint4 per group with a floating zero point, as `aten._weight_int4pack_mm` (tinygemm) reads it.

    Scale and zero point are bf16: `scale = (max - min) / 15`, `zero = min + 8 * scale`, `w = (q - 8) * scale + zero`.
    The kernel pads I to a multiple of 1024 with zeros; a group size that divides I keeps whole groups apart from it.

    Args:
        weight: (O, I) with I divisible by `group_size`. Computed in bf16 whatever its dtype, as the format demands.
        group_size: inputs that share a scale: 32, 64, 128 or 256.
    """
    grouped = weight.to(torch.bfloat16).reshape(*weight.shape[:-1], -1, group_size)
    low = grouped.amin(dim=-1, keepdim=True)
    high = grouped.amax(dim=-1, keepdim=True)
    scale = torch.clamp((high - low) / 15.0, min=torch.finfo(torch.bfloat16).smallest_normal)
    zero = low + scale * 8
    smallest = zero - scale * 8
    quantised = ((grouped - smallest) / scale).round().clamp(0, 15)
    # One fused multiply-add in fp32, rounded once: what the kernel's dequantisation does in registers.
    restored = (quantised.float() - 8) * scale.float() + zero.float()
    return restored.to(torch.bfloat16).to(weight.dtype).reshape(weight.shape)
