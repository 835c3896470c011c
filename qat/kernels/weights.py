"""W + s B A -> the fake-quantised weight, in one read of W and one write.

The sum is float32, the products on tensor cores with three tf32 terms each, which keep float32's accuracy; what is
rounded then is rounded by the very steps of `quantize.integers` and `quantize.float8`. The kernel that writes the
weights for training writes, with `INTEGERS`, the grid that ships: one sum, one rounding.

Shapes: W (O, I), A (R, I), B (O, R), scales and factors (O, G); all contiguous.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,name-defined,valid-type,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.arithmetic import (
    at_least,
    clamped,
    divided,
    from_ordered,
    magnitude_bits,
    nearest,
    ordered_bits,
    to_bf16,
    to_dtype,
    to_float8,
)
from qat.kernels.launch import SETTINGS, launching
from quantize.numerics import Quantised


@triton.jit
def _merged(
    w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ADAPTER: tl.constexpr,
):  # fmt: skip
    """A tile of W + s B A in float32; zeros beyond the edges."""
    inside = (row_ids < rows)[:, None] & (column_ids < columns)[None, :]
    offsets = row_ids.to(tl.int64)[:, None] * columns + column_ids[None, :]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADAPTER:
        low_rank = tl.zeros(w.shape, tl.float32)
        for start in tl.static_range(0, RANK, RANK_BLOCK):
            r = start + tl.arange(0, RANK_BLOCK)
            b = tl.load(
                b_ptr + row_ids[:, None] * RANK + r[None, :],
                mask=(row_ids < rows)[:, None] & (r < RANK)[None, :],
                other=0.0,
            ).to(tl.float32)
            a = tl.load(
                a_ptr + r.to(tl.int64)[:, None] * columns + column_ids[None, :],
                mask=(r < RANK)[:, None] & (column_ids < columns)[None, :],
                other=0.0,
            ).to(tl.float32)
            low_rank = tl.dot(b, a, low_rank, input_precision="tf32x3")
        w = w + scaling * low_rank
    return w


@triton.jit
def _symmetric_group(
    grouped, factor, FACTOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SCALE_BF16: tl.constexpr,
    WEIGHT_BF16: tl.constexpr, EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """(BM, groups, G) -> integers of that shape, scale (BM, groups): `quantise_symmetric`."""
    largest = tl.max(magnitude_bits(grouped), 2).to(tl.float32, bitcast=True)
    scale = to_dtype(divided(largest, (HIGH - LOW) / 2, RECIPROCAL), WEIGHT_BF16, EXACT)
    if FACTOR:
        scale = to_dtype(scale * to_dtype(factor, WEIGHT_BF16, EXACT), WEIGHT_BF16, EXACT)
    scale = to_dtype(at_least(scale, 1.1754943508222875e-38), SCALE_BF16, EXACT)
    # A float32 scale under a bf16 weight is rounded to bf16 for the division alone.
    inverse = to_dtype(
        tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), to_dtype(scale, WEIGHT_BF16, EXACT)), WEIGHT_BF16, EXACT
    )
    steps = to_dtype(grouped * inverse[:, :, None], WEIGHT_BF16, EXACT)
    return clamped(nearest(steps), LOW, HIGH), scale


@triton.jit
def _tinygemm_group(
    grouped, factor, FACTOR: tl.constexpr, WEIGHT_BF16: tl.constexpr, EXACT: tl.constexpr, RECIPROCAL: tl.constexpr
):
    """(BM, groups, G) -> integers of that shape, scale and zero (BM, groups): `quantise_tinygemm`."""
    keys = ordered_bits(grouped)
    low, high = from_ordered(tl.min(keys, 2)), from_ordered(tl.max(keys, 2))
    if FACTOR:
        factor = to_dtype(factor, WEIGHT_BF16, EXACT)
        middle = to_dtype(to_dtype(high + low, WEIGHT_BF16, EXACT) * 0.5, WEIGHT_BF16, EXACT)
        half = to_dtype(to_dtype(high - low, WEIGHT_BF16, EXACT) * 0.5, WEIGHT_BF16, EXACT)
        half = to_dtype(half * factor, WEIGHT_BF16, EXACT)
        low, high = to_dtype(middle - half, WEIGHT_BF16, EXACT), to_dtype(middle + half, WEIGHT_BF16, EXACT)
    width = to_dtype(high - low, WEIGHT_BF16, EXACT)
    scale = to_dtype(divided(width, 15.0, RECIPROCAL), WEIGHT_BF16, EXACT)
    scale = to_bf16(at_least(scale, 1.1754943508222875e-38), EXACT)
    eight = to_dtype(scale * 8.0, WEIGHT_BF16, EXACT)
    zero = to_bf16(low + eight, EXACT)
    smallest = to_dtype(zero - eight, WEIGHT_BF16, EXACT)
    above = to_dtype(grouped - smallest[:, :, None], WEIGHT_BF16, EXACT)
    steps = to_dtype(tl.div_rn(above, tl.broadcast_to(scale[:, :, None], above.shape)), WEIGHT_BF16, EXACT)
    return clamped(nearest(steps), 0.0, 15.0), scale, zero


@triton.jit
def _grouped_kernel(
    w_ptr, a_ptr, b_ptr, factor_ptr, out_ptr, scale_ptr, zero_ptr, scaling, rows, columns,
    GROUP: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TINYGEMM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ADAPTER: tl.constexpr, FACTOR: tl.constexpr,
    INTEGERS: tl.constexpr, WEIGHT_BF16: tl.constexpr, SCALE_BF16: tl.constexpr, OUT_BF16: tl.constexpr,
    EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = BN // GROUP
    row_ids = tl.program_id(0) * BM + tl.arange(0, BM)
    column_ids = tl.program_id(1) * BN + tl.arange(0, BN)
    merged = _merged(w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, RANK, RANK_BLOCK, ADAPTER)
    grouped = tl.reshape(merged, (BM, GROUPS, GROUP))
    group_ids = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    all_groups = columns // GROUP
    group_offsets = row_ids.to(tl.int64)[:, None] * all_groups + group_ids[None, :]
    group_inside = (row_ids < rows)[:, None] & (group_ids < all_groups)[None, :]
    factor = merged
    if FACTOR:
        factor = tl.load(factor_ptr + group_offsets, mask=group_inside, other=1.0).to(tl.float32)
    if TINYGEMM:
        values, scale, zero = _tinygemm_group(grouped, factor, FACTOR, WEIGHT_BF16, EXACT, RECIPROCAL)
        restored = to_bf16((values - 8.0) * scale[:, :, None] + zero[:, :, None], EXACT)
    else:
        values, scale = _symmetric_group(grouped, factor, FACTOR, LOW, HIGH, SCALE_BF16, WEIGHT_BF16, EXACT, RECIPROCAL)
        restored = to_dtype(to_dtype(values * scale[:, :, None], SCALE_BF16, EXACT), OUT_BF16, EXACT)
    inside = (row_ids < rows)[:, None] & (column_ids < columns)[None, :]
    offsets = row_ids.to(tl.int64)[:, None] * columns + column_ids[None, :]
    if INTEGERS:
        written = tl.reshape(values, (BM, BN))
        tl.store(out_ptr + offsets, written.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(scale_ptr + group_offsets, scale.to(scale_ptr.dtype.element_ty), mask=group_inside)
        if TINYGEMM:
            tl.store(zero_ptr + group_offsets, zero.to(zero_ptr.dtype.element_ty), mask=group_inside)
    else:
        written = tl.reshape(restored, (BM, BN))
        tl.store(out_ptr + offsets, written.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rows_kernel(
    w_ptr, a_ptr, b_ptr, factor_ptr, out_ptr, scale_ptr, scaling, rows,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FLOAT8: tl.constexpr, ADAPTER: tl.constexpr, FACTOR: tl.constexpr, WEIGHT_BF16: tl.constexpr,
    EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """One scale a row: the row's extreme first, then its values; W comes from the cache the second time."""
    row_ids = tl.program_id(0) * BM + tl.arange(0, BM)
    most = tl.zeros([BM, BN], tl.int32)
    for start in range(0, COLUMNS, BN):
        column_ids = start + tl.arange(0, BN)
        merged = _merged(w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, COLUMNS, column_ids, RANK, RANK_BLOCK, ADAPTER)
        most = tl.maximum(most, magnitude_bits(merged))
    largest = tl.max(most, 1).to(tl.float32, bitcast=True)
    factor = largest
    if FACTOR:
        factor = tl.load(factor_ptr + row_ids, mask=row_ids < rows, other=1.0).to(tl.float32)
    if FLOAT8:  # `quantise_fp8`
        scale = to_dtype(divided(largest, 448.0, RECIPROCAL), WEIGHT_BF16, EXACT)
        if FACTOR:
            scale = scale * factor
        divisor = tl.where(scale == 0.0, 1.0, scale)
    else:  # `quantise_int8_rows`
        scale = to_dtype(divided(largest, 127.5, RECIPROCAL), WEIGHT_BF16, EXACT)
        if FACTOR:
            scale = to_dtype(scale * to_dtype(factor, WEIGHT_BF16, EXACT), WEIGHT_BF16, EXACT)
        # torch rounds the bound to the dtype of what it clamps; float32's epsilon is a power of two.
        scale = at_least(scale, 1.1920928955078125e-07)
        divisor = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    tl.store(scale_ptr + row_ids, scale, mask=row_ids < rows)
    for start in range(0, COLUMNS, BN):
        column_ids = start + tl.arange(0, BN)
        merged = _merged(w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, COLUMNS, column_ids, RANK, RANK_BLOCK, ADAPTER)
        if FLOAT8:
            steps = tl.div_rn(merged, tl.broadcast_to(divisor[:, None], merged.shape))
            values = to_float8(clamped(steps, -448.0, 448.0), EXACT)
        else:
            values = clamped(nearest(merged * divisor[:, None]), -128.0, 127.0)
        inside = (row_ids < rows)[:, None] & (column_ids < COLUMNS)[None, :]
        offsets = row_ids.to(tl.int64)[:, None] * COLUMNS + column_ids[None, :]
        tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=inside)


def _rank(lora_a: Tensor | None) -> tuple[int, int]:
    """(rank, its block: a power of two from 16, which tensor cores need, to 64)."""
    rank = 1 if lora_a is None else lora_a.shape[0]
    return rank, min(max(16, triton.next_power_of_2(rank)), 64)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().contiguous() for tensor in tensors]


def grouped_weight(
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    factor: Tensor | None,
    group_size: int,
    scale_dtype: torch.dtype,
    *,
    bits: int | None,
    out: torch.dtype | None,
) -> Tensor | Quantised:
    """W + s B A on a grid with a scale per group.

    Args:
        weight: (O, I) bf16 or float32. lora_a, lora_b: float32 or bf16, or None for W alone.
        bits: width of symmetric integers; None = tinygemm's int4.
        out: dtype of the restored weight (O, I) to return; None returns the integers and scales.
    """
    weight, lora_a, lora_b, factor = _contiguous(weight, lora_a, lora_b, factor)  # type: ignore[assignment]
    rows, columns = weight.shape
    tinygemm = bits is None
    low, high = (0, 15) if bits is None else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    integers = out is None
    result = torch.empty_like(weight, dtype=torch.int8 if out is None else out)
    scale_type = torch.bfloat16 if tinygemm else scale_dtype
    shape = (rows, columns // group_size) if integers else (0,)
    scale = torch.empty(shape, dtype=scale_type, device=weight.device)
    zero = torch.empty_like(scale)
    rank, rank_block = _rank(lora_a)
    block_columns = max(128, group_size)
    block_rows = 32 if block_columns == 128 else 16
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns))
    with launching(weight):
        _grouped_kernel[grid](
            weight, lora_a, lora_b, factor, result, scale, zero, scaling, rows, columns,
            GROUP=group_size, RANK=rank, RANK_BLOCK=rank_block, BM=block_rows, BN=block_columns,
            TINYGEMM=tinygemm, LOW=float(low), HIGH=float(high), ADAPTER=lora_a is not None,
            FACTOR=factor is not None, INTEGERS=integers,
            WEIGHT_BF16=lora_a is None and weight.dtype == torch.bfloat16,
            SCALE_BF16=scale_type == torch.bfloat16, OUT_BF16=out == torch.bfloat16,
            num_warps=4, **SETTINGS,
        )  # fmt: skip
    if not integers:
        return result
    return Quantised(result, scale, zero if tinygemm else None)


def row_weight(
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    factor: Tensor | None,
    *,
    values: torch.dtype,
) -> Quantised:
    """W + s B A on a grid with a float32 scale per row.

    Args:
        values: float8_e4m3fn for `quantise_fp8`; the dtype that holds the integers of `quantise_int8_rows`.
    """
    weight, lora_a, lora_b, factor = _contiguous(weight, lora_a, lora_b, factor)  # type: ignore[assignment]
    rows, columns = weight.shape
    result = torch.empty_like(weight, dtype=values)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=weight.device)
    rank, rank_block = _rank(lora_a)
    block_rows, block_columns = 16, min(512, max(16, triton.next_power_of_2(columns)))
    with launching(weight):
        _rows_kernel[(triton.cdiv(rows, block_rows),)](
            weight, lora_a, lora_b, factor, result, scale, scaling, rows,
            COLUMNS=columns, RANK=rank, RANK_BLOCK=rank_block, BM=block_rows, BN=block_columns,
            FLOAT8=values == torch.float8_e4m3fn, ADAPTER=lora_a is not None, FACTOR=factor is not None,
            WEIGHT_BF16=lora_a is None and weight.dtype == torch.bfloat16,
            num_warps=8, **SETTINGS,
        )  # fmt: skip
    return Quantised(result, scale)
