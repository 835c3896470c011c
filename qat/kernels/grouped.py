"""The merged weight on a grid with a scale per group, in one read of W and one write.

What is rounded is rounded by the very steps of `quantize.integers`. The kernel that writes the weights for training
writes, with `INTEGERS`, the grid that ships: one sum, one rounding.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,name-defined,valid-type,misc"

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.arithmetic import at_least, clamped, divided, greatest, least, nearest, quotient, to_bf16, to_dtype
from qat.kernels.launch import Launcher, Plan
from qat.kernels.merged import (
    Blocks,
    Kind,
    a_of_expert,
    fitted,
    layer_of,
    merged_tile,
    pick,
    pick_rows,
    rank_of,
    rows_of,
    tensors_of,
    tile_of_a,
)
from quantize.numerics import Quantised


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
def _asymmetric_group(
    grouped, factor, MSLK: tl.constexpr, FACTOR: tl.constexpr, WEIGHT_BF16: tl.constexpr, EXACT: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """(BM, groups, G) -> integers less 8 of that shape, bf16 scale and zero (BM, groups).

    `quantise_tinygemm`, or with `MSLK` `quantise_int4_mslk`, whose integers see the scale before bf16 rounds it.
    """
    low, high = least(grouped, 2, EXACT), greatest(grouped, 2, EXACT)
    if FACTOR:
        factor = to_dtype(factor, WEIGHT_BF16, EXACT)
        middle = to_dtype(to_dtype(high + low, WEIGHT_BF16, EXACT) * 0.5, WEIGHT_BF16, EXACT)
        half = to_dtype(to_dtype(high - low, WEIGHT_BF16, EXACT) * 0.5, WEIGHT_BF16, EXACT)
        half = to_dtype(half * factor, WEIGHT_BF16, EXACT)
        low, high = to_dtype(middle - half, WEIGHT_BF16, EXACT), to_dtype(middle + half, WEIGHT_BF16, EXACT)
    width = to_dtype(high - low, WEIGHT_BF16, EXACT)
    if MSLK:
        exact = divided(at_least(width, 1e-6), 15.0, RECIPROCAL)
        scale, zero = to_bf16(exact, EXACT), to_bf16(low + exact * 8.0, EXACT)
        steps = quotient(grouped - low[:, :, None], exact[:, :, None], False, EXACT)
    else:
        scale = to_dtype(divided(width, 15.0, RECIPROCAL), WEIGHT_BF16, EXACT)
        scale = to_bf16(at_least(scale, 1.1754943508222875e-38), EXACT)
        eight = to_dtype(scale * 8.0, WEIGHT_BF16, EXACT)
        zero = to_bf16(low + eight, EXACT)
        smallest = to_dtype(zero - eight, WEIGHT_BF16, EXACT)
        above = to_dtype(grouped - smallest[:, :, None], WEIGHT_BF16, EXACT)
        steps = to_dtype(quotient(above, scale[:, :, None], True, EXACT), WEIGHT_BF16, EXACT)
    # As in `nearest`: next to 1.5 * 2**23 a float32 holds no fractions.
    return clamped(steps + 12582912.0, 12582912.0, 12582927.0) - 12582920.0, scale, zero


@triton.jit
def _grouped_kernel(
    w_0, w_1, w_2, a_0, a_1, a_2, b_0, b_1, b_2, factor_0, factor_1, factor_2, out_ptr, scale_ptr, zero_ptr,
    scaling, rows_0, rows_1, rows_2, columns,
    COUNT: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, ASYMMETRIC: tl.constexpr, MSLK: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, ADAPTER: tl.constexpr, FACTOR: tl.constexpr, INTEGERS: tl.constexpr,
    WEIGHT_BF16: tl.constexpr, SCALE_BF16: tl.constexpr, OUT_BF16: tl.constexpr, EXPERT_ROWS: tl.constexpr,
    EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """A strip of `STEPS` tiles one below the other, so that a tile of A is read once for all of them."""
    GROUPS: tl.constexpr = BN // GROUP
    index = layer_of(tl.program_id(1), rows_0, rows_1, BM * STEPS, COUNT)
    rows, before, strips = pick_rows(index, rows_0, rows_1, rows_2, BM * STEPS)
    w_ptr = pick(index, w_0, w_1, w_2, COUNT)
    column_ids = tl.program_id(0) * BN + tl.arange(0, BN)
    group_ids = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    all_groups = columns // GROUP
    a_ptr, b_ptr, first_a, factor_ptr = w_ptr, w_ptr, column_ids, w_ptr
    if ADAPTER:
        a_ptr, b_ptr = pick(index, a_0, a_1, a_2, COUNT), pick(index, b_0, b_1, b_2, COUNT)
        a_ptr = a_of_expert(a_ptr, (tl.program_id(1) - strips) * STEPS * BM, columns, RANK, EXPERT_ROWS)
        first_a = tile_of_a(a_ptr, columns, column_ids, 0, RANK, RANK_BLOCK)
    if FACTOR:
        factor_ptr = pick(index, factor_0, factor_1, factor_2, COUNT)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row_ids = ((tl.program_id(1) - strips) * STEPS + step) * BM + tl.arange(0, BM)
        merged = merged_tile(
            w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, first_a, RANK, RANK_BLOCK, ADAPTER
        )
        grouped = tl.reshape(merged, (BM, GROUPS, GROUP))
        group_inside = (row_ids < rows)[:, None] & (group_ids < all_groups)[None, :]
        factor = merged
        if FACTOR:
            factor_offsets = row_ids.to(tl.int64)[:, None] * all_groups + group_ids[None, :]
            factor = tl.load(factor_ptr + factor_offsets, mask=group_inside, other=1.0).to(tl.float32)
        if ASYMMETRIC:
            values, scale, zero = _asymmetric_group(grouped, factor, MSLK, FACTOR, WEIGHT_BF16, EXACT, RECIPROCAL)
            # The product is exact, so that the fused sum is the same as the separate one.
            restored = to_bf16(tl.fma(values, tl.broadcast_to(scale[:, :, None], values.shape),
                                      tl.broadcast_to(zero[:, :, None], values.shape)), EXACT)  # fmt: skip
        else:
            values, scale = _symmetric_group(
                grouped, factor, FACTOR, LOW, HIGH, SCALE_BF16, WEIGHT_BF16, EXACT, RECIPROCAL
            )
            restored = to_dtype(to_dtype(values * scale[:, :, None], SCALE_BF16, EXACT), OUT_BF16, EXACT)
        inside = (row_ids < rows)[:, None] & (column_ids < columns)[None, :]
        out_rows = (row_ids + before).to(tl.int64)[:, None]
        offsets = out_rows * columns + column_ids[None, :]
        if INTEGERS:
            written = tl.reshape(values + 8.0 if ASYMMETRIC else values, (BM, BN))
            tl.store(out_ptr + offsets, written.to(out_ptr.dtype.element_ty), mask=inside)
            group_offsets = out_rows * all_groups + group_ids[None, :]
            tl.store(scale_ptr + group_offsets, scale.to(scale_ptr.dtype.element_ty), mask=group_inside)
            if ASYMMETRIC:
                tl.store(zero_ptr + group_offsets, zero.to(zero_ptr.dtype.element_ty), mask=group_inside)
        else:
            written = tl.reshape(restored, (BM, BN))
            tl.store(out_ptr + offsets, written.to(out_ptr.dtype.element_ty), mask=inside)


_grouped = Launcher(_grouped_kernel)
SYMMETRIC = Blocks(rows=64, columns=64, steps=8, warps=4, stages=3)
ASYMMETRIC = Blocks(rows=32, columns=128, steps=4, warps=4, stages=3)


def grouped_weight(
    layers: Sequence[Any],
    kind: Kind,
    group_size: int,
    scale_dtype: torch.dtype,
    *,
    bits: int | None,
    out: torch.dtype | None,
    mslk: bool = False,
) -> Tensor | Quantised:
    """W + s B A of layers that are `alike`, one below the other, on a grid with a scale per group.

    Args:
        layers: their weights (O, I) are bf16 or float32; the adapters too, or None for W alone.
        kind: what `alike` found.
        bits: width of symmetric integers; None = asymmetric int4.
        out: dtype of the restored weights (sum of O, I) to return; None returns the integers and scales.
        mslk: of the asymmetric formats, mslk's in place of tinygemm's.
    """
    columns, total, device = kind.columns, sum(kind.rows), layers[0].weight.device
    result = torch.empty(total, columns, dtype=torch.int8 if out is None else out, device=device)
    scale = zero = None
    if out is None:
        dtype = torch.bfloat16 if bits is None else scale_dtype
        scale = torch.empty(total, columns // group_size, dtype=dtype, device=device)
        zero = torch.empty_like(scale) if bits is None else None
    plan = _plan(kind, group_size, scale_dtype, bits, out, mslk)
    _grouped(plan, (*tensors_of(layers), result, scale, zero), layers[0].scaling)
    return result if scale is None else Quantised(result, scale, zero)


@cache
def _plan(
    kind: Kind, group_size: int, scale_dtype: torch.dtype, bits: int | None, out: torch.dtype | None, mslk: bool
) -> Plan:
    blocks = fitted(ASYMMETRIC if bits is None else SYMMETRIC, kind, group_size)
    strip = blocks.rows * blocks.steps
    low, high = (0.0, 15.0) if bits is None else (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    return Plan(
        grid=(-(-kind.columns // blocks.columns), sum(-(-count // strip) for count in kind.rows), 1),
        numbers=(*rows_of(kind), kind.columns),
        constants=(
            len(kind.rows), group_size, *rank_of(kind), blocks.rows, blocks.columns, blocks.steps, blocks.stages,
            bits is None, mslk, low, high, kind.rank > 0, kind.dtypes[3] is not None, out is None,
            kind.weight_bf16 and not mslk,  # which computes in float32
            bits is None or scale_dtype == torch.bfloat16, out == torch.bfloat16, kind.expert_rows,
        ),
        warps=blocks.warps,
    )  # fmt: skip
