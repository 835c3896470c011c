"""The merged weight on a grid with a scale per row, by the steps of `quantize.integers` and `quantize.float8`.

The row's extreme has to be known before its first value: a program goes over its rows twice, and finds what it read
before in the cache where that is large enough.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,name-defined,valid-type,misc"

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from qat.kernels.arithmetic import (
    at_least,
    clamped,
    divided,
    fp8_scale,
    magnitude_bits,
    nearest,
    quotient,
    to_dtype,
    to_float8,
)
from qat.kernels.launch import Launcher, Plan
from qat.kernels.merged import (
    Blocks,
    Kind,
    a_of_expert,
    layer_of,
    merged_tile,
    pick,
    pick_rows,
    rank_of,
    rows_of,
    stages_of,
    tensors_of,
    tile_of_a,
    within_expert,
)
from quantize.numerics import Quantised


@triton.jit
def _tile(
    w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ADAPTER: tl.constexpr,
):  # fmt: skip
    """`merged_tile` with its own first tile of A."""
    first_a = column_ids
    if ADAPTER:
        first_a = tile_of_a(a_ptr, columns, column_ids, 0, RANK, RANK_BLOCK)
    return merged_tile(
        w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, first_a, RANK, RANK_BLOCK, ADAPTER
    )


@triton.jit
def _scale(
    largest, factor, FLOAT8: tl.constexpr, MSLK: tl.constexpr, FACTOR: tl.constexpr, WEIGHT_BF16: tl.constexpr,
    EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """(scale, what the weight is divided by, for `FLOAT8`, or multiplied by) of rows up to `largest`."""
    if FLOAT8:
        scale = fp8_scale(largest, MSLK, WEIGHT_BF16, EXACT, RECIPROCAL)
        if FACTOR:
            scale = scale * factor
        step = tl.where(scale == 0.0, 1.0, scale)
    else:  # `quantise_int8_rows`
        scale = to_dtype(divided(largest, 127.5, RECIPROCAL), WEIGHT_BF16, EXACT)
        if FACTOR:
            scale = to_dtype(scale * to_dtype(factor, WEIGHT_BF16, EXACT), WEIGHT_BF16, EXACT)
        scale = at_least(scale, 1.1920928955078125e-07)
        step = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return scale, step


@triton.jit
def _rows_kernel(
    w_0, w_1, w_2, a_0, a_1, a_2, b_0, b_1, b_2, factor_0, factor_1, factor_2, out_ptr, scale_ptr,
    scaling, rows_0, rows_1, rows_2,
    columns: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, FLOAT8: tl.constexpr, MSLK: tl.constexpr, ADAPTER: tl.constexpr,
    FACTOR: tl.constexpr, WEIGHT_BF16: tl.constexpr, EXPERT_ROWS: tl.constexpr, EXACT: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """`BM` rows: once over their columns for the largest magnitudes, once for the values."""
    index = layer_of(tl.program_id(0), rows_0, rows_1, BM, COUNT)
    rows, before, strips = pick_rows(index, rows_0, rows_1, rows_2, BM)
    w_ptr = pick(index, w_0, w_1, w_2, COUNT)
    a_ptr, b_ptr = w_ptr, w_ptr
    if ADAPTER:
        a_ptr, b_ptr = pick(index, a_0, a_1, a_2, COUNT), pick(index, b_0, b_1, b_2, COUNT)
        a_ptr = a_of_expert(a_ptr, (tl.program_id(0) - strips) * BM, columns, RANK, EXPERT_ROWS)
    row_ids = (tl.program_id(0) - strips) * BM + tl.arange(0, BM)
    row_inside = row_ids < rows
    out_rows = row_ids + before
    # One for each place in a tile: the rows' are found at the end, as finding them makes all warps wait for each other.
    largest_bits = tl.zeros([BM, BN], tl.int32)
    for start in tl.range(0, columns, BN, num_stages=STAGES):
        column_ids = start + tl.arange(0, BN)
        merged = _tile(
            w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, RANK, RANK_BLOCK, ADAPTER
        )  # fmt: skip
        largest_bits = tl.maximum(largest_bits, magnitude_bits(merged))
    largest = tl.max(largest_bits, 1).to(tl.float32, bitcast=True)
    factor = largest
    if FACTOR:
        factor_ptr = pick(index, factor_0, factor_1, factor_2, COUNT)
        factor = tl.load(factor_ptr + row_ids, mask=row_inside, other=1.0).to(tl.float32)
    scale, step = _scale(largest, factor, FLOAT8, MSLK, FACTOR, WEIGHT_BF16, EXACT, RECIPROCAL)
    tl.store(scale_ptr + out_rows, scale, mask=row_inside)
    for start in tl.range(0, columns, BN, num_stages=STAGES):
        column_ids = start + tl.arange(0, BN)
        merged = _tile(
            w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, RANK, RANK_BLOCK, ADAPTER
        )  # fmt: skip
        if FLOAT8:
            steps = quotient(merged, step[:, None], WEIGHT_BF16 and not FACTOR, EXACT)
            values = to_float8(clamped(steps, -448.0, 448.0), EXACT)
        else:
            values = clamped(nearest(merged * step[:, None]), -128.0, 127.0)
        inside = row_inside[:, None] & (column_ids < columns)[None, :]
        offsets = out_rows.to(tl.int64)[:, None] * columns + column_ids[None, :]
        tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=inside)


_rows = Launcher(_rows_kernel)
MANY_ROWS = Blocks(rows=32, columns=128, warps=4, stages=3)
FEW_ROWS = Blocks(rows=16, columns=128, warps=4, stages=4)
"""For weights of few rows, which would leave a part of the GPU without work."""


def row_weight(layers: Sequence[Any], kind: Kind, *, values: torch.dtype, mslk: bool = False) -> Quantised:
    """W + s B A of layers that are `alike`, one below the other, on a grid with a float32 scale per row.

    Args:
        layers: as for `grouped_weight`.
        kind: what `alike` found.
        values: float8_e4m3fn for `quantise_fp8`; the dtype that holds the integers of `quantise_int8_rows`.
        mslk: `quantise_fp8_mslk` in place of `quantise_fp8`.
    """
    total, device = sum(kind.rows), layers[0].weight.device
    result = torch.empty(total, kind.columns, dtype=values, device=device)
    scale = torch.empty(total, 1, dtype=torch.float32, device=device)
    _rows(_plan(kind, values, mslk), (*tensors_of(layers), result, scale), layers[0].scaling)
    return Quantised(result, scale)


@cache
def _plan(kind: Kind, values: torch.dtype, mslk: bool) -> Plan:
    blocks = within_expert(MANY_ROWS if sum(kind.rows) >= 256 * MANY_ROWS.rows else FEW_ROWS, kind)
    return Plan(
        grid=(sum(-(-count // blocks.rows) for count in kind.rows), 1, 1),
        numbers=rows_of(kind),
        constants=(
            kind.columns, len(kind.rows), *rank_of(kind), blocks.rows, blocks.columns, stages_of(blocks, kind),
            values == torch.float8_e4m3fn, mslk, kind.rank > 0, kind.dtypes[3] is not None,
            kind.weight_bf16 and not mslk,  # which computes in float32
            kind.expert_rows,
        ),
        warps=blocks.warps,
    )  # fmt: skip
