"""Integer formats: torchao's Intx and Int8, tinygemm's int4 and mslk's. See `quantize.numerics`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quantize.numerics import Numbers, Quantised, grouped_by, span_symmetric

INT8_RANGE = (-128, 127)


@torch.no_grad()
def quantise_symmetric(
    weight: Tensor,
    group_size: int | None,
    scale_dtype: torch.dtype,
    factor: Tensor | None = None,
    *,
    bits: int,
    bf16_scales: bool = False,
) -> Quantised:
    """Symmetric signed integers with one scale per group of neighbouring inputs.

    The scale is `max|w| / ((qmax - qmin) / 2)`, as in torchao's `IntxUnpackedToInt8Tensor` (`MappingType.SYMMETRIC`).

    Args:
        weight: (O, I) with I divisible by `group_size`. With a float32 weight and bf16 scales the integers are nearest
            to the float32 weight under the scale as it ships.
        group_size: inputs that share a scale; None gives one scale per output row.
        scale_dtype: dtype of the scales.
        factor: (O, G) multiplies the scale; below 1 the largest weights clip.
        bits: width of the integer, 2 to 8.
        bf16_scales: round the scales to bf16's values, whatever `scale_dtype` holds them.
    """
    low, high = symmetric_range(bits)
    grouped = grouped_by(weight, group_size)  # (O, G, group_size)
    negative = torch.clamp(grouped.amin(dim=-1, keepdim=True), max=0)
    positive = torch.clamp(grouped.amax(dim=-1, keepdim=True), min=0)
    scale = torch.maximum(-negative, positive) / (float(high - low) / 2)
    if factor is not None:
        scale = scale * factor.to(scale.dtype).unsqueeze(-1)
    scale = torch.clamp(scale, min=torch.finfo(scale_dtype).smallest_normal).squeeze(-1)
    scale = (scale.to(torch.bfloat16) if bf16_scales else scale).to(scale_dtype)
    return Quantised(nearest_symmetric(weight, Quantised(weight, scale), bits=bits), scale)


@torch.no_grad()
def nearest_symmetric(weight: Tensor, quantised: Quantised, *, bits: int) -> Tensor:
    """Integers nearest to a weight (O, I) under given scales, ties as torchao rounds them."""
    scale = quantised.scale
    grouped = weight.reshape(*scale.shape, -1)  # (O, G, group_size)
    values = torch.clamp(torch.round(grouped * (1.0 / scale.to(weight.dtype)).unsqueeze(-1)), *symmetric_range(bits))
    return values.reshape(weight.shape)


@torch.no_grad()
def restore_symmetric(quantised: Quantised, dtype: torch.dtype) -> Tensor:
    """Integers times scale, as torchao's `dequantize_affine` computes it in `dtype`."""
    values, groups = quantised.values.to(dtype), quantised.scale.shape[-1]
    grouped = values.reshape(*values.shape[:-1], groups, values.shape[-1] // groups)
    return (grouped * quantised.scale.unsqueeze(-1)).to(dtype).reshape(values.shape)


def symmetric_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed integer of that width."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


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
def quantise_int8_rows(
    weight: Tensor, group_size: int | None, scale_dtype: torch.dtype, factor: Tensor | None = None
) -> Quantised:
    """Symmetric int8 per output row with float32 scales, as torchao's `Int8Tensor` has them.

    Args:
        weight: (O, I). group_size: not read: one scale a row. scale_dtype: not read: float32 in every checkpoint.
        factor: (O, 1) multiplies the scale.
    """
    low, high = INT8_RANGE
    negative = torch.clamp(weight.amin(dim=-1, keepdim=True), max=0)
    positive = torch.clamp(weight.amax(dim=-1, keepdim=True), min=0)
    scale = torch.maximum(-negative, positive) / (float(high - low) / 2)
    if factor is not None:
        scale = scale * factor.to(scale.dtype)
    scale = torch.clamp(scale, min=torch.finfo(torch.float32).eps).to(torch.float32)
    return Quantised(nearest_int8_rows(weight, Quantised(weight, scale)), scale)


@torch.no_grad()
def nearest_int8_rows(weight: Tensor, quantised: Quantised) -> Tensor:
    """Integers nearest to a weight (O, I) under given float32 scales (O, 1)."""
    return torch.clamp(torch.round(weight * (1.0 / quantised.scale)), *INT8_RANGE)


@torch.no_grad()
def linear_int8_rows(inputs: Tensor, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of `Int8Tensor`: integers as they are, the row's scale after the sum, both rounded to the dtype."""
    rows = inputs.reshape(-1, inputs.shape[-1]) @ weight.values.to(dtype).t()
    rows = (rows * weight.scale.to(dtype).flatten()).reshape(*inputs.shape[:-1], rows.shape[-1])
    return rows if bias is None else rows + bias


@torch.no_grad()
def encode_int8_rows(activation: Tensor) -> Quantised:
    """Symmetric int8 of a layer's input (..., I) with one float32 scale per token (dynamic quantisation)."""
    quantised = quantise_int8_rows(activation, None, torch.float32)
    return Quantised(quantised.values.to(torch.int8), quantised.scale)


@torch.no_grad()
def int8_symmetric_per_token(activation: Tensor) -> Tensor:
    """Round trip of `encode_int8_rows`, (..., I)."""
    return restore_symmetric(encode_int8_rows(activation), activation.dtype)


@torch.no_grad()
def linear_int8_int8(inputs: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of `Int8Tensor` with dynamic int8 activations: whole sums, rounded to the dtype twice.

    The sum times the token's scale is rounded once; that times the row's float32 scale, plus the bias, once more.
    """
    summed = integer_product(inputs.values.reshape(-1, inputs.values.shape[-1]), weight.values)
    output = (summed * inputs.scale.reshape(-1, 1)).to(dtype) * weight.scale.flatten()
    output = (output if bias is None else output + bias).to(dtype)
    return output.reshape(*inputs.values.shape[:-1], output.shape[-1])


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """(N, I) x (O, I) -> (N, O): the exact sum of int8 products, as the float32 nearest to it."""
    width = left.shape[-1]
    if left.is_cuda and width % 8 == 0 and right.shape[0] % 8 == 0 and width > 0:
        rows = torch.nn.functional.pad(left, (0, 0, 0, max(0, 32 - left.shape[0])))  # the kernel wants more than 16
        return torch._int_mm(rows, right.to(torch.int8).t())[: left.shape[0]].float()
    # float32 holds every partial sum of 1,024 products of int8. Not torch's int8 kernel: without VNNI it saturates.
    exact = torch.float32 if width <= 1024 else torch.float64
    return (left.to(exact) @ right.to(exact).t()).float()


# ---------------------------------------------------------------------- tinygemm's int4


@torch.no_grad()
def quantise_tinygemm(
    weight: Tensor, group_size: int | None, scale_dtype: torch.dtype, factor: Tensor | None = None
) -> Quantised:
    """Asymmetric uint4 per group with a floating zero point, as `aten._weight_int4pack_mm` (tinygemm) reads it.

    Scale and zero point are bf16: `scale = (max - min) / 15`, `zero = min + 8 * scale`, `w = (q - 8) * scale + zero`.
    The kernel pads I to a multiple of 1024 with zeros; a group size that divides I keeps whole groups apart from it.

    Args:
        weight: (O, I) with I divisible by `group_size`. bf16 is computed in bf16, as torchao does; float32 chooses the
            integers nearest to the float32 weight under the scale and zero point as they ship.
        group_size: inputs that share a scale: 32, 64, 128 or 256.
        scale_dtype: not read: the kernel takes bf16.
        factor: (O, G) shrinks the range around its middle.
    """
    shipped = torch.bfloat16
    grouped = grouped_by(weight if weight.dtype == torch.float32 else weight.to(shipped), group_size)
    low = grouped.amin(dim=-1, keepdim=True)
    high = grouped.amax(dim=-1, keepdim=True)
    if factor is not None:
        middle, half = (high + low) / 2, (high - low) / 2 * factor.to(low.dtype).unsqueeze(-1)
        low, high = middle - half, middle + half
    scale = torch.clamp((high - low) / 15.0, min=torch.finfo(shipped).smallest_normal).to(shipped)
    zero = (low + scale.to(low.dtype) * 8).to(shipped)
    chosen = Quantised(weight, scale.squeeze(-1), zero.squeeze(-1))
    return Quantised(nearest_tinygemm(weight, chosen), chosen.scale, chosen.zero)


@torch.no_grad()
def nearest_tinygemm(weight: Tensor, quantised: Quantised) -> Tensor:
    """Integers from 0 to 15 nearest to a weight (O, I), in float32 or else bf16, under given scales and zero points."""
    assert quantised.zero is not None
    grouped = weight if weight.dtype == torch.float32 else weight.to(torch.bfloat16)
    grouped = grouped.reshape(*quantised.scale.shape, -1)  # (O, G, group_size)
    scale, zero = (part.to(grouped.dtype).unsqueeze(-1) for part in (quantised.scale, quantised.zero))
    return ((grouped - (zero - scale * 8)) / scale).round().clamp(0, 15).reshape(weight.shape)


@torch.no_grad()
def restore_tinygemm(quantised: Quantised, dtype: torch.dtype) -> Tensor:
    """One fused multiply-add in fp32, rounded once to bf16: what the kernel's dequantisation does in registers."""
    assert quantised.zero is not None
    values = quantised.values.float()
    grouped = values.reshape(*values.shape[:-1], quantised.scale.shape[-1], -1)
    restored = (grouped - 8) * quantised.scale.float().unsqueeze(-1) + quantised.zero.float().unsqueeze(-1)
    return restored.to(torch.bfloat16).to(dtype).reshape(values.shape)


@torch.no_grad()
def quantise_int4_mslk(
    weight: Tensor, group_size: int | None, scale_dtype: torch.dtype, factor: Tensor | None = None
) -> Quantised:
    """Asymmetric int4 per group as mslk's `int4_row_quantize_zp`: the integers see the scale before bf16 rounds it.

    Args:
        weight: (O, I). scale_dtype: not read: the kernel takes bf16. factor: (O, G) shrinks the range around its
            middle.

    Returns:
        values from 0 to 15, where the kernel's are from -8 to 7.
    """
    grouped = grouped_by(weight.float(), group_size)
    low, high = grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True)
    if factor is not None:
        middle, half = (high + low) / 2, (high - low) / 2 * factor.float().unsqueeze(-1)
        low, high = middle - half, middle + half
    scale = torch.clamp(high - low, min=1e-6) / 15
    zero = low + scale * 8
    values = ((grouped - low) / scale).round().clamp(0, 15)
    return Quantised(values.reshape(weight.shape), scale.squeeze(-1).bfloat16(), zero.squeeze(-1).bfloat16())


def span_tinygemm(quantised: Quantised) -> tuple[Tensor, Tensor, Tensor]:
    """The range of tinygemm's 16 values, half a step beyond the first and the last."""
    assert quantised.zero is not None
    scale, zero = quantised.scale.float(), quantised.zero.float()
    return zero - 8.5 * scale, zero - 0.5 * scale, zero + 7.5 * scale


# ---------------------------------------------------------------------- the formats


def symmetric(bits: int, *, int8_activations: bool = False, bf16_scales: bool = False) -> Numbers:
    """Integers of `bits` with a scale per group (torchao's Intx formats), on 16-bit or int8 activations."""
    low, high = symmetric_range(bits)
    return Numbers(
        quantise=partial(quantise_symmetric, bits=bits, bf16_scales=bf16_scales),
        restore=restore_symmetric,
        span=partial(span_symmetric, low=low - 0.5, high=high + 0.5),
        activation=int8_asymmetric_per_token if int8_activations else None,
        nearest=partial(nearest_symmetric, bits=bits),
    )


INT8_INT4 = symmetric(4, int8_activations=True)
INT8_INT4_XNNPACK = symmetric(4, int8_activations=True, bf16_scales=True)  # which casts the scales to bf16
INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (symmetric(bits) for bits in range(2, 9))
INT8_ROWS = Numbers(
    quantise=quantise_int8_rows,
    restore=restore_symmetric,
    span=partial(span_symmetric, low=-128.5, high=127.5),
    linear=linear_int8_rows,
    nearest=nearest_int8_rows,
)
INT8_INT8 = replace(
    INT8_ROWS,
    activation=int8_symmetric_per_token,
    encode=encode_int8_rows,
    decode=restore_symmetric,
    linear=linear_int8_int8,
)
TINYGEMM = Numbers(
    quantise=quantise_tinygemm, restore=restore_tinygemm, span=span_tinygemm, bias_after=True, nearest=nearest_tinygemm
)
INT4_MSLK = replace(TINYGEMM, quantise=quantise_int4_mslk)
