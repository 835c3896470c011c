"""float8 formats, of torch's kernel and of mslk's, and float8 activations on int4 weights. See `quantize.numerics`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from quantize.integers import nearest_symmetric, restore_symmetric
from quantize.numerics import Numbers, Quantised, grouped_by, span_symmetric

FP8_MAX = 448.0  # largest finite float8_e4m3fn
FP8_LEAST = 2.0**-40
"""The smallest largest magnitude of a token that its scale is made for: torchao's `activation_value_lb`. Without one a
token whose input is all zero, as padding's is where its embedding is, becomes 0 / 0, and NaN spreads to its neighbours
through attention. A power of two, which bf16 holds."""


def least_of(kernel: str) -> float | None:
    """The bound that a checkpoint names for one of torchao's kernels (KernelPreference): mslk's has one of its own."""
    return FP8_LEAST if kernel == "TORCH" else None


@torch.no_grad()
def quantise_fp8(
    weight: Tensor,
    group_size: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
    factor: Tensor | None = None,
    *,
    least: float | None = None,
) -> Quantised:
    """float8_e4m3fn with one fp32 scale per row: `max|x| / 448`.

    Args:
        weight: (..., I). A row of zeros stays zero, where torchao divides 0 by 0.
        group_size: not read: one scale a row. scale_dtype: not read: float32 in every checkpoint.
        factor: (O, 1) multiplies the scale.
        least: the scale is made for this magnitude where a row's largest is smaller.
    """
    largest = weight.abs().amax(dim=-1, keepdim=True)
    if least is not None:
        largest = largest.clamp(min=least)
    scale = (largest / FP8_MAX).to(torch.float32)
    if factor is not None:
        scale = scale * factor.float()
    return Quantised(nearest_fp8(weight, Quantised(weight, scale)), scale)


@torch.no_grad()
def nearest_fp8(weight: Tensor, quantised: Quantised) -> Tensor:
    """float8 nearest to a weight (..., I) under given scales (..., 1)."""
    scaled = weight.to(torch.float32) / torch.where(quantised.scale == 0, 1.0, quantised.scale)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


@torch.no_grad()
def restore_fp8(quantised: Quantised, dtype: torch.dtype) -> Tensor:
    """float8 times the row's scale, in float32, rounded once."""
    return (quantised.values.to(torch.float32) * quantised.scale).to(dtype)


def quantise_fp8_token(values: Tensor) -> Quantised:
    """Activations (..., I) in float8 with one scale per token: `max(max|x|, FP8_LEAST) / 448`."""
    return quantise_fp8(values, least=FP8_LEAST)


@torch.no_grad()
def fp8_per_row(values: Tensor) -> Tensor:
    """Round trip through float8 with one scale per token, (..., I)."""
    return restore_fp8(quantise_fp8_token(values), values.dtype)


def linear_fp8(inputs: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of `Float8Tensor` with torch's kernel: float8 operands, both scales after the sum, one rounding.

    Where the GPU has the kernel it is the kernel itself; elsewhere the same sum of exact products in float32. Its
    callers have switched gradients off: doing so again for every layer of a step costs as much as a launch.
    """
    left = _rows(inputs)
    if left.values.is_cuda and dtype == torch.bfloat16 and _capability() >= (8, 9):
        output = torch._scaled_mm(
            left.values,
            weight.values.t(),
            scale_a=left.scale,
            scale_b=weight.scale.t(),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    else:
        summed = _float8_product(left, weight.values, weight.scale)
        output = (summed if bias is None else summed + bias.float()).to(dtype)
    return output.reshape(*inputs.values.shape[:-1], output.shape[-1])


@cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _rows(inputs: Quantised) -> Quantised:
    """(..., I) and (..., 1) -> (N, I) and (N, 1)."""
    return Quantised(inputs.values.reshape(-1, inputs.values.shape[-1]), inputs.scale.reshape(-1, 1))


# ---------------------------------------------------------------------- mslk's kernels (PyPI: mslk-cuda)


@torch.no_grad()
def quantise_fp8_mslk(
    weight: Tensor,
    group_size: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
    factor: Tensor | None = None,
) -> Quantised:
    """float8 per row as mslk's `quantize_fp8_row`: the scale stays float32, and no row's is below 1 / 512 / 448.

    torchao's own quantiser rounds the scale of bf16 values to bf16, which moves 1.5% of them to a neighbour.
    """
    largest = weight.float().abs().amax(dim=-1, keepdim=True).clamp(min=1 / 512)
    scale = largest / torch.full_like(largest, FP8_MAX)  # by a number CUDA multiplies with its reciprocal
    if factor is not None:
        scale = scale * factor.float()
    return Quantised((weight.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)


@torch.no_grad()
def fp8_per_row_mslk(values: Tensor) -> Tensor:
    """Round trip through mslk's float8 with one scale per token, (..., I)."""
    return restore_fp8(quantise_fp8_mslk(values), values.dtype)


@torch.no_grad()
def linear_fp8_mslk(inputs: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of mslk's `f8f8bf16_rowwise`; its bias is added to the rounded sum."""
    left = _rows(inputs)
    kernel = _mslk_rowwise() if left.values.is_cuda and dtype == torch.bfloat16 else None
    if kernel is not None:
        output = kernel(left.values, weight.values, left.scale, weight.scale, bias=bias, use_fast_accum=True)
    else:
        output = _float8_product(left, weight.values, weight.scale).to(dtype)
        output = output if bias is None else output + bias
    return output.reshape(*inputs.values.shape[:-1], output.shape[-1])


@cache
def _mslk_rowwise() -> Callable[..., Tensor] | None:
    """mslk's kernel where it is installed, so that training multiplies with what ships."""
    if find_spec("mslk") is None or _capability() < (9, 0):
        return None
    import mslk.gemm  # noqa: F401  registers the op

    return torch.ops.mslk.f8f8bf16_rowwise


def _float8_product(left: Quantised, values: Tensor, scale: Tensor) -> Tensor:
    """(N, I) x (O, I) -> (N, O) float32: exact products summed in float32, then the token's scale, then the row's."""
    if values.is_cuda:  # every float8 is a bf16 number
        rows = torch.mm(left.values.bfloat16(), values.bfloat16().t(), out_dtype=torch.float32)
    else:
        rows = left.values.float() @ values.float().t()
    return rows * left.scale * scale.flatten()


@torch.no_grad()
def quantise_fp8_int4(
    weight: Tensor, group_size: int | None, scale_dtype: torch.dtype, factor: Tensor | None = None
) -> Quantised:
    """Symmetric int4 per group whose operand is float8 once more: mslk's `f8i4bf16_rowwise` (torchao's PLAIN layout).

    Args:
        weight: (O, I). group_size: 128 in the kernel. scale_dtype: not read: the kernel takes bf16. factor: (O, G)
            multiplies the scale.
    """
    grouped = grouped_by(weight.float(), group_size)
    scale = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / 8
    if factor is not None:
        scale = scale * factor.float().unsqueeze(-1)
    values = (grouped / scale).round().clamp(-8, 7)
    return Quantised(values.reshape(weight.shape), scale.squeeze(-1).bfloat16())


@torch.no_grad()
def restore_fp8_int4(quantised: Quantised, dtype: torch.dtype) -> Tensor:
    """What the tensor core multiplies (O, I): integer times scale in bf16, rounded to float8, with no scale of the row.

    The weights of small rows fall among float8's subnormals: the kernel's own loss, beside that of 4 bits.
    """
    operand = restore_symmetric(quantised, torch.bfloat16).float().clamp(-FP8_MAX, FP8_MAX)
    return operand.to(torch.float8_e4m3fn).to(dtype)


@torch.no_grad()
def linear_fp8_int4(inputs: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of `f8i4bf16_rowwise`: float8 operands, the token's scale after the sum."""
    operand = restore_fp8_int4(weight, torch.float32).to(torch.float8_e4m3fn)
    scale = torch.ones_like(weight.scale[:, 0], dtype=torch.float32)
    output = _float8_product(_rows(inputs), operand, scale).to(dtype)
    output = output if bias is None else output + bias
    return output.reshape(*inputs.values.shape[:-1], output.shape[-1])


# ---------------------------------------------------------------------- the formats


FP8 = Numbers(
    quantise=quantise_fp8,
    restore=restore_fp8,
    span=partial(span_symmetric, low=-FP8_MAX, high=FP8_MAX),
    activation=fp8_per_row,
    encode=quantise_fp8_token,
    decode=restore_fp8,
    linear=linear_fp8,
    nearest=nearest_fp8,
)
FP8_MSLK = Numbers(
    quantise=quantise_fp8_mslk,
    restore=restore_fp8,
    span=partial(span_symmetric, low=-FP8_MAX, high=FP8_MAX),
    activation=fp8_per_row_mslk,
    encode=quantise_fp8_mslk,
    decode=restore_fp8,
    linear=linear_fp8_mslk,
    nearest=nearest_fp8,
)
FP8_INT4 = Numbers(
    quantise=quantise_fp8_int4,
    restore=restore_fp8_int4,
    span=partial(span_symmetric, low=-8.5, high=7.5),
    activation=fp8_per_row_mslk,
    encode=quantise_fp8_mslk,
    decode=restore_fp8,
    linear=linear_fp8_int4,
    nearest=partial(nearest_symmetric, bits=4),
)
