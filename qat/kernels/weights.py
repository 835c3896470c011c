"""W + s B A -> the fake-quantised weight, in one read of W and one write; several layers in one launch.

Where a scale spans a row, the row's extreme has to be known first: W is read twice, from the cache where it fits.

The sum is float32, the products on tensor cores as three products of halves, which keeps float32's accuracy; what is
rounded then is rounded by the very steps of `quantize.integers` and `quantize.float8`. The kernel that writes the
weights for training writes, with `INTEGERS`, the grid that ships: one sum, one rounding.

Shapes: W (O, I), A (R, I), B (O, R), scales and factors (O, G); all contiguous.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,name-defined,valid-type,misc"

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.arithmetic import (
    at_least,
    clamped,
    divided,
    greatest,
    least,
    magnitude_bits,
    nearest,
    quotient,
    to_bf16,
    to_dtype,
    to_float8,
    upper,
)
from qat.kernels.launch import Launcher, next_power_of_2
from quantize.numerics import Quantised


@triton.jit
def _pick(index, first, second, third, COUNT: tl.constexpr):
    """The pointer of that index."""
    pointer = first
    if COUNT > 1:  # noqa: SIM102  known when it is compiled, unlike the other
        if index == 1:
            pointer = second
    if COUNT > 2:  # noqa: SIM102
        if index == 2:
            pointer = third
    return pointer


@triton.jit
def _pick_rows(index, first, second, third, STRIP: tl.constexpr):
    """(rows of the layer of that index, rows before it, strips before it)."""
    strips_0, strips_1 = tl.cdiv(first, STRIP), tl.cdiv(second, STRIP)
    rows = tl.where(index == 0, first, tl.where(index == 1, second, third))
    before = tl.where(index == 0, 0, tl.where(index == 1, first, first + second))
    return rows, before, tl.where(index == 0, 0, tl.where(index == 1, strips_0, strips_0 + strips_1))


@triton.jit
def _layer_of(strip, first, second, STRIP: tl.constexpr, COUNT: tl.constexpr):
    """Which of the layers a strip of `STRIP` rows belongs to."""
    index = strip * 0
    if COUNT > 1:
        index += (strip >= tl.cdiv(first, STRIP)).to(tl.int32)
    if COUNT > 2:
        index += (strip >= tl.cdiv(first, STRIP) + tl.cdiv(second, STRIP)).to(tl.int32)
    return index


@triton.jit
def _tile_of_a(a_ptr, columns, column_ids, start, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """Rows `start` to `start + RANK_BLOCK` of A at these columns."""
    r = start + tl.arange(0, RANK_BLOCK)
    inside = (r < RANK)[:, None] & (column_ids < columns)[None, :]
    return tl.load(a_ptr + r.to(tl.int64)[:, None] * columns + column_ids[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _merged(
    w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, first_a,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ADAPTER: tl.constexpr,
):  # fmt: skip
    """A tile of W + s B A in float32; zeros beyond the edges. `first_a` is the first tile of A."""
    inside = (row_ids < rows)[:, None] & (column_ids < columns)[None, :]
    offsets = row_ids.to(tl.int64)[:, None] * columns + column_ids[None, :]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADAPTER:
        low_rank = tl.zeros(w.shape, tl.float32)
        for start in tl.static_range(0, RANK, RANK_BLOCK):
            r = start + tl.arange(0, RANK_BLOCK)
            b_inside = (row_ids < rows)[:, None] & (r < RANK)[None, :]
            b = tl.load(b_ptr + row_ids[:, None] * RANK + r[None, :], mask=b_inside, other=0.0).to(tl.float32)
            a = first_a
            if start > 0:
                a = _tile_of_a(a_ptr, columns, column_ids, start, RANK, RANK_BLOCK)
            b = b * scaling
            upper_a, upper_b = upper(a), upper(b)
            low_rank = tl.dot(b - upper_b, upper_a, low_rank, input_precision="tf32")
            low_rank = tl.dot(upper_b, a - upper_a, low_rank, input_precision="tf32")
            low_rank = tl.dot(upper_b, upper_a, low_rank, input_precision="tf32")
        w = w + low_rank
    return w


@triton.jit
def _symmetric_group(
    grouped, factor, FACTOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SCALE_BF16: tl.constexpr,
    WEIGHT_BF16: tl.constexpr, EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """(BM, groups, G) -> integers of that shape, scale (BM, groups): `quantise_symmetric`."""
    largest = greatest(tl.abs(grouped), 2, EXACT)
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
    low, high = least(grouped, 2, EXACT), greatest(grouped, 2, EXACT)
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
    steps = to_dtype(quotient(above, scale[:, :, None], EXACT), WEIGHT_BF16, EXACT)
    return clamped(nearest(steps), 0.0, 15.0), scale, zero


@triton.jit
def _grouped_kernel(
    w_0, w_1, w_2, a_0, a_1, a_2, b_0, b_1, b_2, factor_0, factor_1, factor_2, out_ptr, scale_ptr, zero_ptr,
    scaling, rows_0, rows_1, rows_2, columns,
    COUNT: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, TINYGEMM: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, ADAPTER: tl.constexpr, FACTOR: tl.constexpr, INTEGERS: tl.constexpr,
    WEIGHT_BF16: tl.constexpr, SCALE_BF16: tl.constexpr, OUT_BF16: tl.constexpr, EXACT: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """A strip of `STEPS` tiles one below the other, so that a tile of A is read once for all of them."""
    GROUPS: tl.constexpr = BN // GROUP
    index = _layer_of(tl.program_id(1), rows_0, rows_1, BM * STEPS, COUNT)
    rows, before, strips = _pick_rows(index, rows_0, rows_1, rows_2, BM * STEPS)
    w_ptr = _pick(index, w_0, w_1, w_2, COUNT)
    column_ids = tl.program_id(0) * BN + tl.arange(0, BN)
    group_ids = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    all_groups = columns // GROUP
    a_ptr, b_ptr, first_a, factor_ptr = w_ptr, w_ptr, column_ids, w_ptr
    if ADAPTER:
        a_ptr, b_ptr = _pick(index, a_0, a_1, a_2, COUNT), _pick(index, b_0, b_1, b_2, COUNT)
        first_a = _tile_of_a(a_ptr, columns, column_ids, 0, RANK, RANK_BLOCK)
    if FACTOR:
        factor_ptr = _pick(index, factor_0, factor_1, factor_2, COUNT)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row_ids = ((tl.program_id(1) - strips) * STEPS + step) * BM + tl.arange(0, BM)
        merged = _merged(
            w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, first_a, RANK, RANK_BLOCK, ADAPTER
        )
        grouped = tl.reshape(merged, (BM, GROUPS, GROUP))
        group_inside = (row_ids < rows)[:, None] & (group_ids < all_groups)[None, :]
        factor = merged
        if FACTOR:
            factor_offsets = row_ids.to(tl.int64)[:, None] * all_groups + group_ids[None, :]
            factor = tl.load(factor_ptr + factor_offsets, mask=group_inside, other=1.0).to(tl.float32)
        if TINYGEMM:
            values, scale, zero = _tinygemm_group(grouped, factor, FACTOR, WEIGHT_BF16, EXACT, RECIPROCAL)
            product = (values - 8.0) * scale[:, :, None]  # exact, so that a fused sum would be the same
            restored = to_bf16(product + zero[:, :, None], EXACT)
        else:
            values, scale = _symmetric_group(
                grouped, factor, FACTOR, LOW, HIGH, SCALE_BF16, WEIGHT_BF16, EXACT, RECIPROCAL
            )
            restored = to_dtype(to_dtype(values * scale[:, :, None], SCALE_BF16, EXACT), OUT_BF16, EXACT)
        inside = (row_ids < rows)[:, None] & (column_ids < columns)[None, :]
        out_rows = (row_ids + before).to(tl.int64)[:, None]
        offsets = out_rows * columns + column_ids[None, :]
        if INTEGERS:
            written = tl.reshape(values, (BM, BN))
            tl.store(out_ptr + offsets, written.to(out_ptr.dtype.element_ty), mask=inside)
            group_offsets = out_rows * all_groups + group_ids[None, :]
            tl.store(scale_ptr + group_offsets, scale.to(scale_ptr.dtype.element_ty), mask=group_inside)
            if TINYGEMM:
                tl.store(zero_ptr + group_offsets, zero.to(zero_ptr.dtype.element_ty), mask=group_inside)
        else:
            written = tl.reshape(restored, (BM, BN))
            tl.store(out_ptr + offsets, written.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rows_kernel(
    w_0, w_1, w_2, a_0, a_1, a_2, b_0, b_1, b_2, factor_0, factor_1, factor_2, extreme_ptr, out_ptr, scale_ptr,
    scaling, rows_0, rows_1, rows_2, columns,
    COUNT: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, EXTREMES: tl.constexpr, FLOAT8: tl.constexpr, ADAPTER: tl.constexpr,
    FACTOR: tl.constexpr, WEIGHT_BF16: tl.constexpr, EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """One scale a row: with `EXTREMES` finds the bits of the rows' largest magnitudes, else writes the values."""
    index = _layer_of(tl.program_id(1), rows_0, rows_1, BM * STEPS, COUNT)
    rows, before, strips = _pick_rows(index, rows_0, rows_1, rows_2, BM * STEPS)
    w_ptr = _pick(index, w_0, w_1, w_2, COUNT)
    column_ids = tl.program_id(0) * BN + tl.arange(0, BN)
    a_ptr, b_ptr, first_a = w_ptr, w_ptr, column_ids
    if ADAPTER:
        a_ptr, b_ptr = _pick(index, a_0, a_1, a_2, COUNT), _pick(index, b_0, b_1, b_2, COUNT)
        first_a = _tile_of_a(a_ptr, columns, column_ids, 0, RANK, RANK_BLOCK)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row_ids = ((tl.program_id(1) - strips) * STEPS + step) * BM + tl.arange(0, BM)
        row_inside = row_ids < rows
        merged = _merged(
            w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, first_a, RANK, RANK_BLOCK, ADAPTER
        )
        out_rows = row_ids + before
        if EXTREMES:
            tl.atomic_max(extreme_ptr + out_rows, tl.max(magnitude_bits(merged), 1), mask=row_inside, sem="relaxed")
        else:
            largest = tl.load(extreme_ptr + out_rows, mask=row_inside, other=0).to(tl.float32, bitcast=True)
            factor = largest
            if FACTOR:
                factor_ptr = _pick(index, factor_0, factor_1, factor_2, COUNT)
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


_grouped = Launcher(_grouped_kernel)
_rows = Launcher(_rows_kernel)
MOST = 3
"""Layers that one launch takes."""


@dataclass(frozen=True)
class Blocks:
    """How a kernel cuts a weight: tiles of `rows` x `columns`, `steps` of them one below the other.

    `stages` - 1 of them are loaded ahead. Found by measuring, on an H100 (docs/RESULTS.md).
    """

    rows: int
    columns: int
    steps: int
    warps: int
    stages: int = 1


SYMMETRIC = Blocks(rows=64, columns=64, steps=8, warps=4, stages=3)
TINYGEMM = Blocks(rows=32, columns=128, steps=2, warps=4, stages=2)
ROWS = Blocks(rows=32, columns=128, steps=4, warps=4, stages=3)


def _fitted(blocks: Blocks, rows: Sequence[int], columns: int, group_size: int) -> Blocks:
    """With columns that hold a group, and so few steps that a small weight still gives work to the whole GPU."""
    if group_size > blocks.columns:
        blocks = replace(blocks, rows=max(16, blocks.rows * blocks.columns // group_size), columns=group_size)
    tiles = -(-sum(rows) // blocks.rows) * -(-columns // blocks.columns)
    most = max(1, tiles // 256)
    return replace(blocks, steps=min(blocks.steps, 1 << (most.bit_length() - 1)))


def alike(layers: Sequence[Any]) -> bool:
    """Whether one launch takes these layers: their weights and adapters differ in out_features alone."""

    def kind(layer: Any) -> Any:
        parts = (layer.weight, layer.lora_a, layer.lora_b, layer.factor)
        return (
            layer.scaling, layer.weight.shape[1], None if layer.lora_a is None else layer.lora_a.shape[0],
            [None if part is None else part.dtype for part in parts],
        )  # fmt: skip

    return len(layers) <= MOST and all(kind(layer) == kind(layers[0]) for layer in layers[1:])


def _pointers(layers: Sequence[Any]) -> tuple[list[Tensor | None], list[int]]:
    """(the tensors of the layers by kind, three of each, and their rows), contiguous."""
    tensors: list[Tensor | None] = []
    for parts in zip(*((layer[0], layer[1], layer[2], layer[4]) for layer in layers), strict=True):
        found = [part if part is None or part.is_contiguous() else part.contiguous() for part in parts]
        tensors += found + [found[0]] * (MOST - len(found))
    rows = [layer.weight.shape[0] for layer in layers]
    return tensors, rows + [0] * (MOST - len(rows))


def _rank(lora_a: Tensor | None) -> tuple[int, int]:
    """(rank, its block: a power of two from 16, which tensor cores need, to 64)."""
    rank = 1 if lora_a is None else lora_a.shape[0]
    return rank, min(max(16, next_power_of_2(rank)), 64)


def grouped_weight(
    layers: Sequence[Any],
    group_size: int,
    scale_dtype: torch.dtype,
    *,
    bits: int | None,
    out: torch.dtype | None,
    blocks: Blocks | None = None,
) -> Tensor | Quantised:
    """W + s B A of layers that are `alike`, one below the other, on a grid with a scale per group.

    Args:
        layers: their weights (O, I) are bf16 or float32; the adapters too, or None for W alone.
        bits: width of symmetric integers; None = tinygemm's int4.
        out: dtype of the restored weights (sum of O, I) to return; None returns the integers and scales.
    """
    tensors, rows = _pointers(layers)
    weight, lora_a = layers[0].weight, layers[0].lora_a
    columns, total, tinygemm, integers = weight.shape[1], sum(rows), bits is None, out is None
    result = torch.empty(total, columns, dtype=torch.int8 if out is None else out, device=weight.device)
    scale_type = torch.bfloat16 if tinygemm else scale_dtype
    scale = zero = None
    if integers:
        scale = torch.empty(total, columns // group_size, dtype=scale_type, device=weight.device)
        zero = torch.empty_like(scale) if tinygemm else None
    blocks = _fitted(blocks or (TINYGEMM if tinygemm else SYMMETRIC), rows, columns, group_size)
    strip = blocks.rows * blocks.steps
    _grouped(
        (-(-columns // blocks.columns), sum(-(-count // strip) for count in rows), 1),
        (*tensors, result, scale, zero, layers[0].scaling, *rows, columns),
        len(layers), group_size, *_rank(lora_a), blocks.rows, blocks.columns, blocks.steps, blocks.stages, tinygemm,
        0.0 if bits is None else -(2.0 ** (bits - 1)), 15.0 if bits is None else 2.0 ** (bits - 1) - 1,
        lora_a is not None, layers[0].factor is not None, integers,
        lora_a is None and weight.dtype == torch.bfloat16, scale_type == torch.bfloat16, out == torch.bfloat16,
        num_warps=blocks.warps,
    )  # fmt: skip
    return result if scale is None else Quantised(result, scale, zero)


def row_weight(layers: Sequence[Any], *, values: torch.dtype, blocks: Blocks = ROWS) -> Quantised:
    """W + s B A of layers that are `alike`, one below the other, on a grid with a float32 scale per row.

    Args:
        layers: as for `grouped_weight`.
        values: float8_e4m3fn for `quantise_fp8`; the dtype that holds the integers of `quantise_int8_rows`.
    """
    tensors, rows = _pointers(layers)
    weight, lora_a = layers[0].weight, layers[0].lora_a
    columns, total = weight.shape[1], sum(rows)
    blocks = _fitted(blocks, rows, columns, 1)
    strip = blocks.rows * blocks.steps
    result = torch.empty(total, columns, dtype=values, device=weight.device)
    scale = torch.empty(total, 1, dtype=torch.float32, device=weight.device)
    extremes = torch.zeros(total, dtype=torch.int32, device=weight.device)
    grid = (-(-columns // blocks.columns), sum(-(-count // strip) for count in rows), 1)
    for finds_extremes in (True, False):
        _rows(
            grid, (*tensors, extremes, result, scale, layers[0].scaling, *rows, columns),
            len(layers), *_rank(lora_a), blocks.rows, blocks.columns, blocks.steps, blocks.stages, finds_extremes,
            values == torch.float8_e4m3fn, lora_a is not None, layers[0].factor is not None,
            lora_a is None and weight.dtype == torch.bfloat16,
            num_warps=blocks.warps,
        )  # fmt: skip
    return Quantised(result, scale)
