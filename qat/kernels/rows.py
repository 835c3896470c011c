"""The merged weight on a grid with a scale per row, by the steps of `quantize.integers` and `quantize.float8`.

The row's extreme has to be known before its first value: W is read twice, from the cache where it fits.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,name-defined,valid-type,misc"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from qat.kernels.arithmetic import at_least, clamped, divided, magnitude_bits, nearest, quotient, to_dtype, to_float8
from qat.kernels.launch import Launcher
from qat.kernels.merged import Blocks, fitted, layer_of, merged_tile, pick, pick_rows, pointers, rank_of, tile_of_a
from quantize.numerics import Quantised


@triton.jit
def _rows_kernel(
    w_0, w_1, w_2, a_0, a_1, a_2, b_0, b_1, b_2, factor_0, factor_1, factor_2, extreme_ptr, out_ptr, scale_ptr,
    scaling, rows_0, rows_1, rows_2, columns,
    COUNT: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, EXTREMES: tl.constexpr, FLOAT8: tl.constexpr, ADAPTER: tl.constexpr,
    FACTOR: tl.constexpr, WEIGHT_BF16: tl.constexpr, EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """One scale a row: with `EXTREMES` finds the bits of the rows' largest magnitudes, else writes the values."""
    index = layer_of(tl.program_id(1), rows_0, rows_1, BM * STEPS, COUNT)
    rows, before, strips = pick_rows(index, rows_0, rows_1, rows_2, BM * STEPS)
    w_ptr = pick(index, w_0, w_1, w_2, COUNT)
    column_ids = tl.program_id(0) * BN + tl.arange(0, BN)
    a_ptr, b_ptr, first_a = w_ptr, w_ptr, column_ids
    if ADAPTER:
        a_ptr, b_ptr = pick(index, a_0, a_1, a_2, COUNT), pick(index, b_0, b_1, b_2, COUNT)
        first_a = tile_of_a(a_ptr, columns, column_ids, 0, RANK, RANK_BLOCK)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row_ids = ((tl.program_id(1) - strips) * STEPS + step) * BM + tl.arange(0, BM)
        row_inside = row_ids < rows
        merged = merged_tile(
            w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, first_a, RANK, RANK_BLOCK, ADAPTER
        )
        out_rows = row_ids + before
        if EXTREMES:
            tl.atomic_max(extreme_ptr + out_rows, tl.max(magnitude_bits(merged), 1), mask=row_inside, sem="relaxed")
        else:
            largest = tl.load(extreme_ptr + out_rows, mask=row_inside, other=0).to(tl.float32, bitcast=True)
            factor = largest
            if FACTOR:
                factor_ptr = pick(index, factor_0, factor_1, factor_2, COUNT)
                factor = tl.load(factor_ptr + row_ids, mask=row_inside, other=1.0).to(tl.float32)
            if FLOAT8:  # `quantise_fp8`
                scale = to_dtype(divided(largest, 448.0, RECIPROCAL), WEIGHT_BF16, EXACT)
                if FACTOR:
                    scale = scale * factor
                divisor = tl.where(scale == 0.0, 1.0, scale)
                values = to_float8(clamped(quotient(merged, divisor[:, None], EXACT), -448.0, 448.0), EXACT)
            else:  # `quantise_int8_rows`
                scale = to_dtype(divided(largest, 127.5, RECIPROCAL), WEIGHT_BF16, EXACT)
                if FACTOR:
                    scale = to_dtype(scale * to_dtype(factor, WEIGHT_BF16, EXACT), WEIGHT_BF16, EXACT)
                scale = at_least(scale, 1.1920928955078125e-07)
                inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
                values = clamped(nearest(merged * inverse[:, None]), -128.0, 127.0)
            tl.store(scale_ptr + out_rows, scale, mask=row_inside & (tl.program_id(0) == 0))
            inside = row_inside[:, None] & (column_ids < columns)[None, :]
            offsets = out_rows.to(tl.int64)[:, None] * columns + column_ids[None, :]
            tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=inside)


_rows = Launcher(_rows_kernel)
ROWS = Blocks(rows=32, columns=128, steps=4, warps=4, stages=3)


def row_weight(layers: Sequence[Any], *, values: torch.dtype) -> Quantised:
    """W + s B A of layers that are `alike`, one below the other, on a grid with a float32 scale per row.

    Args:
        layers: as for `grouped_weight`.
        values: float8_e4m3fn for `quantise_fp8`; the dtype that holds the integers of `quantise_int8_rows`.
    """
    tensors, rows = pointers(layers)
    weight, lora_a = layers[0].weight, layers[0].lora_a
    columns, total = weight.shape[1], sum(rows)
    blocks = fitted(ROWS, rows, columns, 1)
    strip = blocks.rows * blocks.steps
    result = torch.empty(total, columns, dtype=values, device=weight.device)
    scale = torch.empty(total, 1, dtype=torch.float32, device=weight.device)
    extremes = torch.zeros(total, dtype=torch.int32, device=weight.device)
    grid = (-(-columns // blocks.columns), sum(-(-count // strip) for count in rows), 1)
    for finds_extremes in (True, False):
        _rows(
            grid, (*tensors, extremes, result, scale, layers[0].scaling, *rows, columns),
            len(layers), *rank_of(lora_a), blocks.rows, blocks.columns, blocks.steps, blocks.stages, finds_extremes,
            values == torch.float8_e4m3fn, lora_a is not None, layers[0].factor is not None,
            lora_a is None and weight.dtype == torch.bfloat16,
            num_warps=blocks.warps,
        )  # fmt: skip
    return Quantised(result, scale)
