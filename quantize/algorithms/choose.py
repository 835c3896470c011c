"""Chooses the numbers of a format for a 16-bit model with `quantize.algorithms`, decoder block by decoder block.

Each block sees the inputs that the quantised blocks before it give, so errors are made good where they arise, and only
one block's activations are held at a time. Fused experts are set apart meanwhile, and each is a layer like any other.

Shapes: `B` batch, `T` tokens, `I` in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.algorithms import ALGORITHMS, are_calibrated, check_algorithms
from quantize.algorithms.calibration import Batch, distance, input_products, run_block, sample_inputs, start_batches
from quantize.algorithms.experts import experts_apart, join_experts
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


@dataclass(frozen=True)
class Chosen:
    """What the algorithms left.

    Attributes:
        grid: quantised layer -> its weight on its grid. The model's weights in memory are the 16-bit ones that the
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
    if are_calibrated(ordered) and not batches:
        raise UserError(f"{', '.join(ordered)}: calibration data is needed; name some with --calibration FILE")
    dtype = getattr(torch, target.dtype) if target.dtype else model.dtype
    format_ = _Format(target.numbers(), group_size, dtype)
    grid: dict[str, Quantised] = {}
    with experts_apart(model) as apart:
        if "spinquant" in ordered:
            notes += rotate_(model)
        if are_calibrated(ordered):
            grid, more = _by_block(model, format_, coverage, apart, ordered, batches, progress)
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
    apart: Mapping[str, str],
    names: tuple[str, ...],
    batches: Sequence[tuple[Tensor, Tensor]],
    progress: Progress | None,
) -> tuple[dict[str, Quantised], list[str]]:
    scaling = next((name for name in names if ALGORITHMS[name].kind == "scales"), None)
    rounding = pick_rounding(names)
    prefix, blocks = find_blocks(model)
    grid: dict[str, Quantised] = {}
    notes = _Notes()
    states = start_batches(model, blocks, batches)
    for number, block in enumerate(blocks):
        layers = {
            name: module
            for name, module in block.named_modules(prefix=f"{prefix}.{number}")
            if apart.get(name, name) in coverage.layers
        }
        if scaling is not None:
            _scale_block(block, number, states, layers, chosen, scaling, notes)
        hessians: dict[str, Tensor] = {}
        if rounding == "gptq":
            hessians = _hessians(block, number, states, layers, apart, chosen.numbers, notes)
        weights: dict[str, Quantised] = {}
        for name, module in layers.items():
            hessian = hessians.pop(name, None)
            # A byte a value, as the layers of all blocks are held at once.
            weights[name] = round_weight(
                rounding, chosen.numbers, module.weight, chosen.group_size, chosen.scale_dtype, hessian
            ).compact()
        with _computing(layers, weights, chosen.numbers):
            for state in states:
                state.hidden = run_block(block, number, state)
        grid |= join_experts(weights, apart)
        if progress is not None:
            progress(number + 1, len(blocks))
    return grid, list(notes.said(scaling, apart))


@dataclass
class _Notes:
    """What the record says of all blocks.

    Attributes:
        scaled, links: how many links are scaled, of how many.
        unlinked: layers that no link leads to. unseen: layers that no calibration token reaches.
        rare: matrices of experts that too few reach.
    """

    scaled: int = 0
    links: int = 0
    unlinked: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    rare: list[str] = field(default_factory=list)

    def said(self, scaling: str | None, apart: Mapping[str, str]) -> Iterator[str]:
        """The notes in words. apart: see `experts_apart`."""
        if scaling is not None:
            yield f"{scaling}: {self.scaled} of {self.links} links between layers are scaled"
        if self.unlinked:
            layers = dict.fromkeys(apart.get(name, name) for name in self.unlinked)
            yield f"not scaled, as what feeds them or reads the same is not known: {', '.join(layers)}"
        if self.unseen:
            yield f"rounded to nearest, as no calibration token reaches them: {', '.join(sorted(self.unseen))}"
        if self.rare:
            yield (
                "rounded to nearest, as fewer calibration tokens reach them than they have inputs: "
                f"{len(self.rare)} of {len(apart)} matrices of experts"
            )


def _hessians(
    block: nn.Module,
    number: int,
    states: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    apart: Mapping[str, str],
    numbers: Numbers,
    notes: _Notes,
) -> dict[str, Tensor]:
    """Layer -> its Hessian (I, I), of those that have one; the notes say which have none."""
    products, found = input_products(block, number, states, layers, numbers), {}
    for name in layers:
        hessian, tokens = products.pop(name, (None, 0))
        # With fewer tokens than inputs it is singular: on inputs of little correlation that were not among them, GPTQ
        # then lost up to 1.7 times as much as rounding to nearest, and less than it with as many tokens as inputs.
        if name in apart and (hessian is None or tokens < hessian.shape[0]):
            notes.rare.append(name)
        elif hessian is None:
            notes.unseen.append(name)
        else:
            found[name] = hessian
    return found


def _scale_block(
    block: nn.Module,
    number: int,
    states: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    chosen: _Format,
    method: Any,
    notes: _Notes,
) -> None:
    """Scales the links of a block where that quantises it better."""
    links = list(find_links(block))
    if not links:
        raise UserError(
            f"{method} knows decoder blocks with self_attn, mlp and their norms, and a {type(block).__name__} has "
            "none of them; leave it out"
        )
    before = run_block(block, number, states[0])
    read = {id(reader) for link in links for reader in link.readers}
    samples = sample_inputs(block, number, states, [module for module in layers.values() if id(module) in read])
    notes.links += len(links)
    notes.unlinked += [name for name, module in layers.items() if id(module) not in read]
    for link in links:
        seen = [samples[id(reader)] for reader in link.readers if id(reader) in samples]
        if not seen:
            continue
        scale = best_scale(link, method, seen, chosen.numbers, chosen.group_size, chosen.scale_dtype)
        if scale is not None:
            link.move(scale)
            notes.scaled += 1
    apart = distance(before, run_block(block, number, states[0]))
    if not apart <= (1e-4 if before.dtype == torch.float32 else 2e-2):
        raise UserError(
            f"{method}: a scaled {type(block).__name__} computes something else ({apart:.1%} apart), so this "
            "architecture cannot be scaled; leave it out"
        )


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
