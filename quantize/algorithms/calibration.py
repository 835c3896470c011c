"""Calibration data on its way through a decoder, one block after another.

Shapes: `B` batch, `T` tokens, `H` hidden size, `I` in_features, `N` calibration tokens that reach a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.algorithms.experts import experts_of
from quantize.experts import count_of
from quantize.numerics import Numbers

_SAMPLED_ROWS = 512
"""Calibration tokens of a layer on which scales are compared."""


@dataclass
class Batch:
    """One batch between two blocks.

    Attributes:
        mask: (B, T) bool, tokens that are no padding.
        hidden: (B, T, H) what the next block reads.
        arguments: the other arguments of each block (attention mask, rotary embedding, ...).
    """

    mask: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@torch.no_grad()
def start_batches(model: Any, blocks: nn.ModuleList, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Batch]:
    """The batches as the first block reads them, with what every block is called with.

    Args:
        batches: (token ids (B, T), attention mask (B, T)).
    """
    found = []
    for ids, attention in batches:
        state = Batch(attention.bool().to(model.device))
        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(_recorder(state), with_kwargs=True).remove)
            model(input_ids=ids.to(model.device), attention_mask=attention.to(model.device), use_cache=False)
        found.append(state)
    return found


def _recorder(state: Batch) -> Any:
    def record(block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        options = dict(options)
        hidden = arguments[0] if arguments else options.pop("hidden_states")
        if not state.arguments:
            state.hidden = hidden
        state.arguments.append((arguments[1:], options))

    return record


def run_block(block: nn.Module, number: int, state: Batch) -> Tensor:
    """The outputs (B, T, H) of one block on a batch that has come that far."""
    arguments, options = state.arguments[number]
    output: Any = block(state.hidden, *arguments, **options)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def distance(before: Tensor, after: Tensor) -> float:
    """How far apart two outputs (..., H) are, relative to the first: what three tokens in four do not exceed.

    Rounding alone sends a token to another expert where two are nearly tied, so a mean over all tokens would not tell
    that from an architecture that computes something else, which shows in all.
    """
    apart = (after.float() - before.float()).norm(dim=-1) / before.float().norm(dim=-1).clamp(min=1e-12)
    return float(apart.flatten().quantile(0.75))


@dataclass(frozen=True)
class Sample:
    """What calibration saw of one layer.

    Attributes:
        layer: the layer.
        inputs: (at most _SAMPLED_ROWS, I) some of its inputs.
        peaks: (I,) largest |input| of all of them, float32.
        tokens: how many reach it.
    """

    layer: Any
    inputs: Tensor
    peaks: Tensor
    tokens: int


def sample_inputs(
    block: nn.Module, number: int, states: Sequence[Batch], modules: Sequence[nn.Module]
) -> dict[int, Sample]:
    """id of a layer -> what it is given; of each that any token reaches."""
    kept: dict[int, list[Tensor]] = {}
    peaks: dict[int, Tensor] = {}
    tokens: dict[int, int] = {}
    each = max(1, _SAMPLED_ROWS // len(states))

    def visit(module: nn.Module, rows: Tensor) -> None:
        key, largest = id(module), rows.float().abs().amax(0)
        peaks[key] = torch.maximum(peaks[key], largest) if key in peaks else largest
        kept.setdefault(key, []).append(rows[:: max(1, rows.shape[0] // each)][:each].clone())
        tokens[key] = tokens.get(key, 0) + rows.shape[0]

    _watch(block, number, states, modules, visit)
    known = {id(module): module for module in modules}
    return {key: Sample(known[key], torch.cat(rows), peaks[key], tokens[key]) for key, rows in kept.items()}


def input_products(
    block: nn.Module, number: int, states: Sequence[Batch], layers: Mapping[str, nn.Module], numbers: Numbers
) -> dict[str, tuple[Tensor, int]]:
    """Layer -> (I, I) sum of x x^T of its inputs as the format rounds them, float32, and N; where any token reaches it.

    The sum is GPTQ's Hessian.
    """
    names = {id(module): name for name, module in layers.items()}
    sums: dict[str, tuple[Tensor, int]] = {}

    def visit(module: nn.Module, rows: Tensor) -> None:
        rounded = (rows if numbers.activation is None else numbers.activation(rows)).float()
        product, name = rounded.t() @ rounded, names[id(module)]
        before, tokens = sums.get(name, (None, 0))
        sums[name] = (product if before is None else before.add_(product), tokens + rows.shape[0])

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
    mask = torch.empty(0)

    def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].flatten(0, -2)
        # An expert's own tokens are fewer than all, padding left out already; or they are all, and none is padding.
        rows = rows[mask.flatten()] if rows.shape[0] == mask.numel() else rows
        if rows.shape[0]:
            visit(module, rows)

    def keep_padding_out(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, chosen, weights = arguments
        return hidden, chosen.masked_fill(~mask.reshape(-1, 1), count_of(module)), weights

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(see).remove)
        for module in block.modules():
            if experts_of(module):
                stack.callback(module.register_forward_pre_hook(keep_padding_out).remove)
        for state in states:
            mask = state.mask
            run_block(block, number, state)
