"""torchao's tensors built from integers and scales that were chosen here, so that nothing is chosen a second time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from quantize.numerics import Quantised


def intx_tensor(quantised: Quantised, dtype: torch.dtype, *, bits: int, int8_activations: bool = False) -> Any:
    """`IntxUnpackedToInt8Tensor` of a weight (O, I): 8 bits a weight on disk whatever `bits` is."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    scale = quantised.scale.to(dtype)
    return IntxUnpackedToInt8Tensor(
        qdata=quantised.values.to(torch.int8),
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=(1, quantised.values.shape[-1] // scale.shape[-1]),
        dtype=dtype,
        activation_quantization="int8_asym_per_token" if int8_activations else None,
    )


def int8_tensor(quantised: Quantised, dtype: torch.dtype, *, int8_activations: bool = False) -> Any:
    """`Int8Tensor`, one scale a row; with dynamic int8 activations per token, or weight only."""
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    return Int8Tensor(
        quantised.values.to(torch.int8),
        quantised.scale,
        [1, quantised.values.shape[-1]],
        dtype,
        zero_point=torch.zeros_like(quantised.scale, dtype=torch.int8),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()) if int8_activations else None,
    )


def tile_packed_tensor(quantised: Quantised, dtype: torch.dtype) -> Any:
    """`Int4TilePackedTo4dTensor`, padded as tinygemm wants it: in_features to 1024, out_features to 8. CUDA only.

    The padding is never read: the inputs are padded with zeros too.
    """
    from torchao.quantization import Int4TilePackedTo4dTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    assert quantised.zero is not None and dtype == torch.bfloat16
    rows, columns = quantised.values.shape
    group = columns // quantised.scale.shape[-1]
    right, below = -columns % 1024, -rows % 8
    values = functional.pad(quantised.values.to(torch.int32), (0, right, 0, below))
    packed = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8).contiguous()
    scale, zero = (
        functional.pad(part, (0, right // group, 0, below)).to(torch.bfloat16)
        for part in (quantised.scale, quantised.zero)
    )
    return Int4TilePackedTo4dTensor(
        qdata=torch.ops.aten._convert_weight_to_int4pack(packed, 8),
        scale_and_zero=pack_tinygemm_scales_and_zeros(scale, zero, torch.bfloat16),
        block_size=[1, group],
        shape=torch.Size((rows, columns)),
    )


def float8_tensor(quantised: Quantised, dtype: torch.dtype, *, kernel: str = "TORCH") -> Any:
    """`Float8Tensor` with dynamic float8 activations per token.

    Args:
        kernel: name of torchao's KernelPreference: who quantises the activations and multiplies.
    """
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    from quantize.float8 import least_of

    preference = KernelPreference[kernel]
    return Float8Tensor(
        quantised.values,
        quantised.scale,
        block_size=[1, quantised.values.shape[-1]],
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(
            torch.float8_e4m3fn,
            PerRow(),
            kernel_preference=preference,
            hp_value_lb=least_of(kernel),
        ),
        kernel_preference=preference,
        dtype=dtype,
    )


def int4_plain_tensor(quantised: Quantised, dtype: torch.dtype, *, float8_activations: bool = False) -> Any:
    """`Int4Tensor` (the PLAIN layout of mslk's kernels): scale and zero point (G, O), integers from -8 to 7.

    Args:
        float8_activations: the symmetric grid of fp8-int4, whose zero point is 0; else integers from 0 to 15.
    """
    from torchao.quantization import Int4Tensor

    values, scale = quantised.values.to(torch.int8), quantised.scale.t().contiguous()
    if float8_activations:
        zero = torch.zeros_like(scale)
    else:
        assert quantised.zero is not None
        values, zero = values - 8, quantised.zero.t().contiguous()
    packed = torch.bitwise_or(values[:, ::2] & 0xF, torch.bitwise_left_shift(values[:, 1::2], 4)).contiguous()
    return Int4Tensor(
        packed,
        scale,
        zero,
        [1, values.shape[-1] // scale.shape[0]],
        values.shape,
        activation_dtype=torch.float8_e4m3fn if float8_activations else dtype,
    )


def nvfp4_tensor(quantised: Quantised, dtype: torch.dtype, *, fp4_activations: bool = False) -> Any:
    """`NVFP4Tensor`: two weights a byte, block scales in the tensor cores' order.

    Args:
        fp4_activations: round the inputs to NVFP4 too, with torch's operations; else weight only.
    """
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs

    activations = QuantizeTensorToNVFP4Kwargs(is_swizzled_scales=True, use_dynamic_per_tensor_scale=True)
    return NVFP4Tensor(
        _packed_fp4(quantised.values),
        _blocked(quantised.scale.to(torch.float8_e4m3fn)),
        16,
        dtype,
        quantised.tensor_scale,
        is_swizzled_scales=True,
        act_quant_kwargs=activations if fp4_activations else None,
    )


def mx_tensor(quantised: Quantised, dtype: torch.dtype, *, bits: int, kernel: str) -> Any:
    """`MXTensor` with dynamic activations of the same format, scales in the tensor cores' order.

    Args:
        kernel: name of torchao's KernelPreference: AUTO is Blackwell's, EMULATED restores both and multiplies.
    """
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.quantization.quantize_.common import KernelPreference

    element = torch.float8_e4m3fn if bits == 8 else torch.float4_e2m1fn_x2
    preference = KernelPreference[kernel]
    activations = QuantizeTensorToMXKwargs(
        elem_dtype=element,
        block_size=32,
        scaling_mode=ScaleCalculationMode.RCEIL,
        kernel_preference=preference,
        is_swizzled_scales=True,
    )
    values = quantised.values if bits == 8 else _packed_fp4(quantised.values)
    scale = _blocked(quantised.scale.to(torch.float8_e8m0fnu))
    return MXTensor(values, scale, element, 32, dtype, preference, activations, True)


def _packed_fp4(values: torch.Tensor) -> torch.Tensor:
    """(O, I) of e2m1 numbers -> (O, I / 2) bytes, the even column in the low half."""
    size = values.float().abs()
    below = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=size.device)
    code = torch.bucketize(size, below, right=True).to(torch.uint8)  # how many of the seven it reaches
    code = code | (values.view(torch.uint8) >> 7 << 3)  # the sign, of zero too
    return (code[:, ::2] | code[:, 1::2] << 4).contiguous()


def _blocked(scale: torch.Tensor) -> torch.Tensor:
    """(O, G) scales of 8 bits as the tensor cores read them: tiles of 128 x 4, padded, each as 32 x 16."""
    from torchao.prototype.mx_formats.utils import to_blocked

    rows, columns = (-(-size // step) for size, step in zip(scale.shape, (128, 4), strict=True))
    blocked: torch.Tensor = to_blocked(scale).view(rows * 32, columns * 16)
    return blocked
