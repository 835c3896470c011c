"""Block-scaled formats of Blackwell's tensor cores: NVFP4, MXFP8 and MXFP4. See `quantize.numerics`.

MX: blocks of 32 share a power of two (e8m0), as OCP's Microscaling Formats Specification 1.0 has them (Rouhani et al.
2023, arXiv 2310.10537). NVFP4: blocks of 16 share a float8 scale (e4m3), and all of them a float32 scale (NVIDIA 2025,
arXiv 2509.25149). The 4-bit numbers are e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.

Here `Quantised.values` are float8_e4m3fn, which holds every e2m1 number too, and `scale` is float32 with the values of
the dtype that ships, so that both can be calculated with. Shapes as in `quantize.numerics`; `N` tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quantize.float8 import FP8_MAX
from quantize.numerics import Numbers, Quantised, grouped_by

FP4_MAX = 6.0  # largest e2m1
NVFP4_BLOCK = 16
MX_BLOCK = 32
_E4M3_SMALLEST = 2.0**-6  # smallest normal e4m3: torchao lets no block scale of NVFP4 fall below it
_E8M0_BIAS = 127


@torch.no_grad()
def round_to_fp4(values: Tensor) -> Tensor:
    """The nearest e2m1 number, ties to the even mantissa, beyond the last one the last one; float8_e4m3fn holds it.

    Args:
        values: float32, any shape.
    """
    clamped = values.clamp(-FP4_MAX, FP4_MAX)
    size = clamped.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))  # of e2m1 around each value
    return (torch.round(clamped / step) * step).to(torch.float8_e4m3fn)


# ---------------------------------------------------------------------- NVFP4


@torch.no_grad()
def quantise_nvfp4(
    weight: Tensor,
    group_size: int | None = NVFP4_BLOCK,
    scale_dtype: torch.dtype = torch.float32,
    factor: Tensor | None = None,
) -> Quantised:
    """NVFP4 with both levels of scales, as torchao's `NVFP4Tensor` and its inference config choose them.

    The scale of the whole tensor is `max|w| / (448 * 6)`; a block's is `max|w| / 6` over that, in e4m3. Activations are
    rounded so too: their scale then depends on every token of the batch.

    Args:
        weight: (..., I). A tensor whose scale float32 cannot invert (all zeros, or all below 1e-35) becomes zeros,
            where torchao gives NaN.
        group_size: not read: 16. scale_dtype: not read.
        factor: (..., G) multiplies the block scales.
    """
    grouped = grouped_by(weight, NVFP4_BLOCK)  # (..., G, 16)
    largest = weight.abs().amax() if weight.numel() else weight.new_zeros(())
    whole = largest.float() / (FP8_MAX * FP4_MAX)
    whole = torch.where(torch.isinf(1.0 / whole), 1.0, whole)
    block = grouped.float().abs().amax(dim=-1) / FP4_MAX
    if factor is not None:
        block = block * factor.float()
    scale = (block / whole).clamp(_E4M3_SMALLEST, FP8_MAX).to(torch.float8_e4m3fn).float()
    chosen = Quantised(weight, scale, tensor_scale=whole)
    return replace(chosen, values=nearest_nvfp4(weight, chosen))


@torch.no_grad()
def nearest_nvfp4(weight: Tensor, quantised: Quantised) -> Tensor:
    """e2m1 numbers nearest to a weight (..., I) under given scales."""
    assert quantised.tensor_scale is not None
    inverse = (1.0 / quantised.tensor_scale) / quantised.scale
    return round_to_fp4(_scaled(weight, inverse))


@torch.no_grad()
def restore_nvfp4(quantised: Quantised, dtype: torch.dtype) -> Tensor:
    """Values times the product of both scales, in float32, rounded once: (..., I)."""
    assert quantised.tensor_scale is not None
    return _scaled(quantised.values, quantised.tensor_scale * quantised.scale).to(dtype)


@torch.no_grad()
def linear_nvfp4(inputs: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of `NVFP4Tensor` with dynamic activations: three roundings to `dtype`, which is bf16 on the hardware.

    The tensor cores sum values times block scales; then comes the product of both tensors' scales, itself rounded to
    `dtype` (up to 0.2% off, for the whole layer), then the bias.
    """
    assert inputs.tensor_scale is not None and weight.tensor_scale is not None
    left = _scaled(inputs.values, inputs.scale).reshape(-1, inputs.values.shape[-1])
    right = _scaled(weight.values, weight.scale)
    if left.is_cuda:  # six significant bits and a small exponent: every operand is a bf16 number
        rows = torch.mm(left.bfloat16(), right.bfloat16().t(), out_dtype=torch.float32)
    else:
        rows = left @ right.t()
    output = rows.to(dtype) * (inputs.tensor_scale * weight.tensor_scale).to(dtype)
    output = output if bias is None else output + bias.to(dtype)
    return output.reshape(*inputs.values.shape[:-1], output.shape[-1])


@torch.no_grad()
def nvfp4_dynamic(activation: Tensor) -> Tensor:
    """Round trip of a layer's input (..., I), all of whose tokens share one scale beside those of their blocks."""
    return restore_nvfp4(quantise_nvfp4(activation), activation.dtype)


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    """(..., I) times (..., G), in float32."""
    grouped = values.float().reshape(*scale.shape, values.shape[-1] // scale.shape[-1])
    return (grouped * scale.unsqueeze(-1)).reshape(values.shape)


# ---------------------------------------------------------------------- MXFP8, MXFP4


@torch.no_grad()
def quantise_mx(
    weight: Tensor,
    group_size: int | None = MX_BLOCK,
    scale_dtype: torch.dtype = torch.float32,
    factor: Tensor | None = None,
    *,
    bits: int,
) -> Quantised:
    """MX with the scale `2 ** ceil(log2(max|w| / largest))`: torchao's RCEIL, the default of its inference config.

    RCEIL never clips, where the specification's own FLOOR does. The logarithm is a float32 one, as torchao's is without
    torch.compile: just above a power of two it may round down, and then the block's largest weight clips by a last bit.

    Args:
        weight: (..., I). A block that the smallest scale (2^-127) is too large for becomes zeros, as torchao's.
        group_size: not read: 32. scale_dtype: not read.
        factor: (..., G) multiplies `max|w|`: the scale moves where that crosses a power of two.
        bits: 8 (e4m3) or 4 (e2m1).
    """
    largest = _largest(bits)
    grouped = grouped_by(weight, MX_BLOCK).float()  # (..., G, 32)
    span = grouped.abs().amax(dim=-1) / largest
    if factor is not None:
        span = span * factor.float()
    exponent = torch.log2(span).ceil().clamp(-_E8M0_BIAS, _E8M0_BIAS)
    chosen = Quantised(weight, torch.exp2(exponent))
    return replace(chosen, values=nearest_mx(weight, chosen, bits=bits))


@torch.no_grad()
def nearest_mx(weight: Tensor, quantised: Quantised, *, bits: int) -> Tensor:
    """e4m3 or e2m1 numbers nearest to a weight (..., I) under given powers of two."""
    smallest = quantised.scale == 2.0**-_E8M0_BIAS
    scaled = _scaled(weight, torch.where(smallest, 1.0, 1.0 / quantised.scale))
    largest = _largest(bits)
    return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn) if bits == 8 else round_to_fp4(scaled)


@torch.no_grad()
def restore_mx(quantised: Quantised, dtype: torch.dtype) -> Tensor:
    """Values times the power of two, in `dtype`: exact but for the largest and smallest numbers it has."""
    values, scale = quantised.values.to(dtype), quantised.scale.to(dtype)
    grouped = values.reshape(*scale.shape, values.shape[-1] // scale.shape[-1])
    return (grouped * scale.unsqueeze(-1)).reshape(values.shape)


@torch.no_grad()
def mx_dynamic(activation: Tensor, *, bits: int) -> Tensor:
    """Round trip of a layer's input (..., I), each token by itself."""
    return restore_mx(quantise_mx(activation, bits=bits), activation.dtype)


def _largest(bits: int) -> float:
    return {8: FP8_MAX, 4: FP4_MAX}[bits]


# ---------------------------------------------------------------------- the formats


def span_blocks(quantised: Quantised, *, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """The range of each block, up to its last value: what lies beyond is clamped."""
    whole = quantised.tensor_scale
    high = largest * (quantised.scale if whole is None else quantised.scale * whole)
    return -high, torch.zeros_like(high), high


def microscaling(bits: int) -> Numbers:
    """MX numbers of `bits`, weights and activations."""
    return Numbers(
        quantise=partial(quantise_mx, bits=bits),
        restore=restore_mx,
        span=partial(span_blocks, largest=_largest(bits)),
        activation=partial(mx_dynamic, bits=bits),
        nearest=partial(nearest_mx, bits=bits),
    )


MXFP8, MXFP4 = microscaling(8), microscaling(4)
NVFP4_WEIGHTS = Numbers(
    quantise=quantise_nvfp4, restore=restore_nvfp4, span=partial(span_blocks, largest=FP4_MAX), nearest=nearest_nvfp4
)
NVFP4 = replace(
    NVFP4_WEIGHTS, activation=nvfp4_dynamic, encode=quantise_nvfp4, decode=restore_nvfp4, linear=linear_nvfp4
)
