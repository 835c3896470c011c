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


def int8_tensor(quantised: Quantised, dtype: torch.dtype) -> Any:
    """`Int8Tensor`, weight only, one scale a row."""
    from torchao.quantization import Int8Tensor

    return Int8Tensor(
        quantised.values.to(torch.int8),
        quantised.scale,
        [1, quantised.values.shape[-1]],
        dtype,
        zero_point=torch.zeros_like(quantised.scale, dtype=torch.int8),
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

    preference = KernelPreference[kernel]
    return Float8Tensor(
        quantised.values,
        quantised.scale,
        block_size=[1, quantised.values.shape[-1]],
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow(), kernel_preference=preference),
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
