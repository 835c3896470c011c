"""W + s B A of one layer, or of several that share their input in one launch: what every format's kernel begins with.

The sum is float32, the products on tensor cores as three products of halves, which keeps float32's accuracy.

Shapes: W (O, I), A (R, I), B (O, R), factors (O, G); all contiguous.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,name-defined,valid-type,misc"

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.arithmetic import upper
from qat.kernels.launch import next_power_of_2

MOST = 3
"""Layers that one launch takes."""
SMALLEST = 16
"""Rows of a tile at least: what tensor cores multiply."""


@triton.jit
def pick(index, first, second, third, COUNT: tl.constexpr):
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
def pick_rows(index, first, second, third, STRIP: tl.constexpr):
    """(rows of the layer of that index, rows before it, strips before it)."""
    strips_0, strips_1 = tl.cdiv(first, STRIP), tl.cdiv(second, STRIP)
    rows = tl.where(index == 0, first, tl.where(index == 1, second, third))
    before = tl.where(index == 0, 0, tl.where(index == 1, first, first + second))
    return rows, before, tl.where(index == 0, 0, tl.where(index == 1, strips_0, strips_0 + strips_1))


@triton.jit
def layer_of(strip, first, second, STRIP: tl.constexpr, COUNT: tl.constexpr):
    """Which of the layers a strip of `STRIP` rows belongs to."""
    index = strip * 0
    if COUNT > 1:
        index += (strip >= tl.cdiv(first, STRIP)).to(tl.int32)
    if COUNT > 2:
        index += (strip >= tl.cdiv(first, STRIP) + tl.cdiv(second, STRIP)).to(tl.int32)
    return index


@triton.jit
def a_of_expert(a_ptr, row, columns, RANK: tl.constexpr, EXPERT_ROWS: tl.constexpr):
    """The A of the expert that a row belongs to; of a layer without experts its own."""
    pointer = a_ptr
    if EXPERT_ROWS > 0:
        pointer = a_ptr + (row // EXPERT_ROWS).to(tl.int64) * RANK * columns
    return pointer


@triton.jit
def tile_of_a(a_ptr, columns, column_ids, start, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """Rows `start` to `start + RANK_BLOCK` of A at these columns."""
    r = start + tl.arange(0, RANK_BLOCK)
    inside = (r < RANK)[:, None] & (column_ids < columns)[None, :]
    offsets = r.to(tl.int64)[:, None] * columns + column_ids[None, :]
    return tl.load(a_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def merged_tile(
    w_ptr, a_ptr, b_ptr, scaling, rows, row_ids, columns, column_ids, first_a,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ADAPTER: tl.constexpr,
):  # fmt: skip
    """A tile of W + s B A in float32; zeros beyond the edges. `first_a` is the first tile of A."""
    inside = (row_ids < rows)[:, None] & (column_ids < columns)[None, :]
    offsets = row_ids.to(tl.int64)[:, None] * columns + column_ids[None, :]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADAPTER:
        low_rank = tl.zeros(w.shape, tl.float32)
        low_rank = _add_product(low_rank, first_a, b_ptr, scaling, rows, row_ids, 0, RANK, RANK_BLOCK)
        if RANK > RANK_BLOCK:  # a loop, not unrolled: shared memory holds one tile of A at a time
            for start in tl.range(RANK_BLOCK, RANK, RANK_BLOCK, num_stages=1):
                a = tile_of_a(a_ptr, columns, column_ids, start, RANK, RANK_BLOCK)
                low_rank = _add_product(low_rank, a, b_ptr, scaling, rows, row_ids, start, RANK, RANK_BLOCK)
        w = w + low_rank
    return w


@triton.jit
def _add_product(low_rank, a, b_ptr, scaling, rows, row_ids, start, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """`low_rank` + s B A of the `RANK_BLOCK` ranks from `start`."""
    r = start + tl.arange(0, RANK_BLOCK)
    inside = (row_ids < rows)[:, None] & (r < RANK)[None, :]
    offsets = row_ids.to(tl.int64)[:, None] * RANK + r[None, :]
    b = tl.load(b_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * scaling
    upper_a, upper_b = upper(a), upper(b)
    low_rank = tl.dot(b - upper_b, upper_a, low_rank, input_precision="tf32")
    low_rank = tl.dot(upper_b, a - upper_a, low_rank, input_precision="tf32")
    return tl.dot(upper_b, upper_a, low_rank, input_precision="tf32")


@dataclass(frozen=True)
class Blocks:
    """How a kernel cuts a weight: tiles of `rows` x `columns`, `steps` of them one below the other.

    `stages` - 1 of them are loaded ahead. Found by measuring, on an H100 (docs/RESULTS.md).
    """

    rows: int
    columns: int
    warps: int
    stages: int
    steps: int = 1


class Kind(NamedTuple):
    """What the launches of layers depend on, beyond the numbers in their tensors.

    Attributes:
        rows: out_features of each layer.
        columns: in_features.
        rank: of the adapter; 0 = none.
        dtypes: of the weight, A, B and the factors.
        experts: matrices that lie one below the other in a single layer, each with an A of its own.
    """

    rows: tuple[int, ...]
    columns: int
    rank: int
    dtypes: tuple[torch.dtype | None, ...]
    experts: int = 1

    @property
    def expert_rows(self) -> int:
        """Rows of one expert; 0 where there is one matrix alone."""
        return self.rows[0] // self.experts if self.experts > 1 else 0

    @property
    def weight_bf16(self) -> bool:
        """Whether what is rounded is a bf16 weight itself, and not a float32 sum."""
        return self.rank == 0 and self.dtypes[0] == torch.bfloat16


def alike(layers: Sequence[Any]) -> Kind | None:
    """The kind of layers that one launch takes: their weights and adapters differ in out_features alone. Else None."""
    first = _kind(layers[0])
    for layer in layers[1:]:
        if layer.scaling != layers[0].scaling or _kind(layer) != first:
            return None
    if first[-1] > 1 and (len(layers) > 1 or layers[0].weight.shape[0] // first[-1] % SMALLEST):
        return None
    return Kind(tuple([layer.weight.shape[0] for layer in layers]), *first) if len(layers) <= MOST else None


def _kind(layer: Any) -> tuple[int, int, tuple[torch.dtype | None, ...], int]:
    weight, lora_a, lora_b, factor = layer.weight, layer.lora_a, layer.lora_b, layer.factor
    dtypes = (
        weight.dtype, None if lora_a is None else lora_a.dtype, None if lora_b is None else lora_b.dtype,
        None if factor is None else factor.dtype,
    )  # fmt: skip
    return weight.shape[1], 0 if lora_a is None else lora_a.shape[0] // layer.experts, dtypes, layer.experts


def tensors_of(layers: Sequence[Any]) -> list[Tensor | None]:
    """The weights, A, B and factors of layers that are `alike`: three of each, contiguous."""
    found: list[Tensor | None] = []
    for index in (0, 1, 2, 4):
        parts = [layer[index] for layer in layers]
        parts = [part if part is None or part.is_contiguous() else part.contiguous() for part in parts]
        found += parts + parts[:1] * (MOST - len(parts))
    return found


def rows_of(kind: Kind) -> tuple[int, ...]:
    """The rows of each layer, as many as a kernel takes."""
    return kind.rows + (0,) * (MOST - len(kind.rows))


def stages_of(blocks: Blocks, kind: Kind) -> int:
    """As many tiles loaded ahead as shared memory has room for: each takes its tiles of A with it."""
    if blocks.columns > 128:
        return 1
    return blocks.stages if kind.rank <= 16 else min(blocks.stages, 2)


def fitted(blocks: Blocks, kind: Kind, group_size: int) -> Blocks:
    """With columns that hold a group, and so few steps that a small weight still gives work to the whole GPU."""
    if group_size > blocks.columns:
        blocks = replace(blocks, rows=max(SMALLEST, blocks.rows * blocks.columns // group_size), columns=group_size)
    tiles = -(-sum(kind.rows) // blocks.rows) * -(-kind.columns // blocks.columns)
    most = max(1, tiles // 256)
    steps = min(blocks.steps, 1 << (most.bit_length() - 1))
    return within_expert(replace(blocks, steps=steps, stages=stages_of(blocks, kind)), kind)


def within_expert(blocks: Blocks, kind: Kind) -> Blocks:
    """With so few rows that a program's lie within one expert: it reads one A."""
    while kind.expert_rows % (blocks.rows * blocks.steps):
        blocks = (
            replace(blocks, steps=blocks.steps // 2) if blocks.steps > 1 else replace(blocks, rows=blocks.rows // 2)
        )
    return blocks


def rank_of(kind: Kind) -> tuple[int, int]:
    """(rank, its block: a power of two from 16, which tensor cores need, to 32, which shared memory has room for)."""
    rank = max(1, kind.rank)
    return rank, min(max(16, next_power_of_2(rank)), 32)
