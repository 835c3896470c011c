"""Chooses the numbers of a format for a 16-bit model with `quantize.algorithms`, decoder block by decoder block.

Each block sees the inputs that the quantised blocks before it give, so errors are made good where they arise, and only
one block's activations are held at a time.

Shapes: `B` batch, `T` tokens, `I` in_features, `N` calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.algorithms import ALGORITHMS, are_calibrated, check_algorithms
from quantize.algorithms.calibration import Batch, run_block, start_batches
from quantize.algorithms.rotation import rotate_
from quantize.algorithms.rounding import pick_rounding, round_weight
from quantize.algorithms.scaling import best_scale
from quantize.algorithms.structure import find_blocks, find_links
from quantize.errors import UserError
from quantize.grid import quantised_weights
from quantize.layers import Coverage, embedding_name, find_weight, untie
from quantize.numerics import Numbers, Quantised
from quantize.schemes import Scheme, Target

Progress = Callable[[int, int], None]

_SAMPLED_ROWS = 512
"""Calibration tokens on which scales are compared."""


@dataclass(frozen=True)
class Chosen:
    """What the algorithms left.

    Attributes:
        grid: quantised module -> its weight on its grid. The model's weights in memory are the 16-bit ones that the
            grid stands for: those of the source, rotated and scaled.
        notes: what was done and left out, in words.
    """

    grid: dict[str, Quantised]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Format:
    numbers: Numbers
    group_size: int | None
    scale_dtype: torch.dtype


def check_fit(names: Sequence[str], scheme: Scheme, target: Target) -> tuple[str, ...]:
    """The algorithms in their order. Raises UserError where one makes no sense for the format."""
    ordered = check_algorithms(names)
    for name in ordered:
        reason = ALGORITHMS[name].integers_only
        if reason and not _has_integers(target.numbers(), scheme.group_size):
            raise UserError(f"algorithm {name} makes no sense for {scheme.name}: {reason}")
    return ordered


def _has_integers(numbers: Numbers, group_size: int | None) -> bool:
    values = numbers.quantise(torch.ones(1, 256), group_size, torch.float32, None).values
    return values.dtype != torch.float8_e4m3fn


@torch.no_grad()
def choose_numbers(
    model: Any,
    scheme: Scheme,
    target: Target,
    group_size: int | None,
    coverage: Coverage,
    names: Sequence[str],
    batches: Sequence[tuple[Tensor, Tensor]] = (),
    progress: Progress | None = None,
) -> Chosen:
    """Chooses the weights of every covered layer; rotates and scales the model in place where asked to.

    Args:
        model: from `quantize.convert.load_plain`, in the dtype that ships.
        names: of `quantize.algorithms.ALGORITHMS`.
        batches: calibration data, (token ids (B, T), attention mask (B, T)), padded on the right.

    Raises:
        UserError: the algorithms do not fit the format or this architecture, or there is no calibration data.
    """
    ordered = check_fit(names, scheme, target)
    notes: list[str] = []
    if scheme.embedding is not None:
        untie(model)
    if "spinquant" in ordered:
        notes += rotate_(model)
    dtype = getattr(torch, target.dtype) if target.dtype else model.dtype
    format_ = _Format(target.numbers(), group_size, dtype)
    grid: dict[str, Quantised] = {}
    if are_calibrated(ordered):
        if not batches:
            raise UserError(f"{', '.join(ordered)}: calibration data is needed; name some with --calibration FILE")
        grid, more = _by_block(model, format_, coverage, ordered, batches, progress)
        notes += more
    outside = [name for name in coverage.layers if name not in grid]
    if grid and outside:
        without = " and ".join(name for name in ordered if ALGORITHMS[name].calibrated)
        notes.append(f"outside the blocks' linear layers, so without {without}: {', '.join(outside)}")
    for name in outside:
        weight = getattr(*find_weight(model, name)).flatten(0, -2)  # the rows of all experts, where they are fused
        grid[name] = round_weight(pick_rounding(ordered), format_.numbers, weight, group_size, dtype).compact()
    if scheme.embedding is not None:
        for _, _, _, quantised in quantised_weights(model, scheme, target, group_size, (), None):
            grid[embedding_name(model)] = quantised
    return Chosen(grid, notes)


def _by_block(
    model: Any,
    chosen: _Format,
    coverage: Coverage,
    names: tuple[str, ...],
    batches: Sequence[tuple[Tensor, Tensor]],
    progress: Progress | None,
) -> tuple[dict[str, Quantised], list[str]]:
    scaling = next((name for name in names if ALGORITHMS[name].kind == "scales"), None)
    rounding = pick_rounding(names)
    prefix, blocks = find_blocks(model)
    grid: dict[str, Quantised] = {}
    unseen: list[str] = []
    scaled = total = 0
    states = start_batches(model, blocks, batches)
    for number, block in enumerate(blocks):
        layers = {
            f"{prefix}.{number}.{name}": module
            for name, module in block.named_modules()
            if f"{prefix}.{number}.{name}" in coverage.layers
        }
        if scaling is not None:
            moved, links = _scale_block(block, number, states, layers, chosen, scaling)
            scaled, total = scaled + moved, total + links
        hessians: dict[str, Tensor] = {}
        if rounding == "gptq":
            hessians = _hessians(block, number, states, layers, chosen.numbers)
            unseen += layers.keys() - hessians.keys()
        for name, module in layers.items():
            weight, hessian = module.weight, hessians.pop(name, None)
            # A byte a value, as the layers of all blocks are held at once.
            grid[name] = round_weight(
                rounding, chosen.numbers, weight, chosen.group_size, chosen.scale_dtype, hessian
            ).compact()
        with _computing(layers, grid, chosen.numbers):
            for state in states:
                state.hidden = run_block(block, number, state)
        if progress is not None:
            progress(number + 1, len(blocks))
    notes = [f"{scaling}: {scaled} of {total} links between layers are scaled"] if scaling else []
    if unseen:
        notes.append(f"rounded to nearest, as no calibration token reaches them: {', '.join(sorted(unseen))}")
    return grid, notes


def _scale_block(
    block: nn.Module,
    number: int,
    states: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    chosen: _Format,
    method: Any,
) -> tuple[int, int]:
    """Scales the links of a block where that quantises it better; how many, and of how many."""
    links = list(find_links(block))
    if not links:
        raise UserError(
            f"{method} knows decoder blocks with self_attn, mlp and their norms, and a {type(block).__name__} has "
            "none of them; leave it out"
        )
    before = run_block(block, number, states[0])
    covered = {id(module) for module in layers.values()}
    samples = _sample_inputs(block, number, states, [link.readers[0] for link in links])
    moved = 0
    for link in links:
        readers = [reader for reader in link.readers if id(reader) in covered]
        if not readers:
            continue
        inputs, peaks = samples[id(link.readers[0])]
        scale = best_scale(link, method, inputs, peaks, readers, chosen.numbers, chosen.group_size, chosen.scale_dtype)
        if scale is not None:
            link.move(scale)
            moved += 1
    apart = float((run_block(block, number, states[0]) - before).float().norm() / before.float().norm())
    if not apart <= (1e-4 if before.dtype == torch.float32 else 2e-2):
        raise UserError(
            f"{method}: a scaled {type(block).__name__} computes something else ({apart:.1%} apart), so this "
            "architecture cannot be scaled; leave it out"
        )
    return moved, len(links)


def _sample_inputs(
    block: nn.Module, number: int, states: Sequence[Batch], modules: Sequence[nn.Linear]
) -> dict[int, tuple[Tensor, Tensor]]:
    """id of a layer -> some of its inputs (<= _SAMPLED_ROWS, I), and the largest |input| of all of them (I,)."""
    kept: dict[int, list[Tensor]] = {id(module): [] for module in modules}
    peaks: dict[int, Tensor] = {}
    each = max(1, _SAMPLED_ROWS // len(states))

    def visit(module: nn.Module, rows: Tensor) -> None:
        largest = rows.float().abs().amax(0)
        peaks[id(module)] = torch.maximum(peaks[id(module)], largest) if id(module) in peaks else largest
        kept[id(module)].append(rows[:: max(1, rows.shape[0] // each)][:each])

    _watch(block, number, states, modules, visit)
    return {key: (torch.cat(rows), peaks[key]) for key, rows in kept.items()}


def _hessians(
    block: nn.Module, number: int, states: Sequence[Batch], layers: Mapping[str, nn.Module], numbers: Numbers
) -> dict[str, Tensor]:
    """Layer -> (I, I) sum of x x^T over the calibration tokens, float32, of the inputs as the format rounds them."""
    names = {id(module): name for name, module in layers.items()}
    sums: dict[str, Tensor] = {}

    def visit(module: nn.Module, rows: Tensor) -> None:
        rounded = (rows if numbers.activation is None else numbers.activation(rows)).float()
        product, name = rounded.t() @ rounded, names[id(module)]
        sums[name] = sums[name].add_(product) if name in sums else product

    _watch(block, number, states, list(layers.values()), visit)
    return sums


def _watch(
    block: nn.Module,
    number: int,
    states: Sequence[Batch],
    modules: Sequence[nn.Module],
    visit: Callable[[nn.Module, Tensor], None],
) -> None:
    """Runs a block on every batch; `visit` gets each module's inputs (N, I) at the tokens that are no padding."""
    with ExitStack() as stack:
        mask = torch.empty(0)

        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            visit(module, arguments[0][mask])

        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        for state in states:
            mask = state.mask
            run_block(block, number, state)


@contextmanager
def _computing(layers: Mapping[str, nn.Module], grid: Mapping[str, Quantised], numbers: Numbers) -> Iterator[None]:
    """Inside, the layers compute as they will ship."""
    for name, module in layers.items():
        quantised: Any = grid[name]
        module.forward = lambda inputs, at=quantised, of=module: numbers.compute(inputs, at, of.bias)
    try:
        yield
    finally:
        for module in layers.values():
            del module.forward
