"""Calibration data on its way through a decoder, one block after another.

Shapes: `B` batch, `T` tokens, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
