"""How far a last bit carries: a model beside itself, with its embeddings changed by about as much as they are rounded.

Two programs that compute the same model round sums in another order. Where activations are quantised, a last bit moves
some of them to the next number of their grid, and every layer after it sees that. No program can agree better with a
model than the model does with itself under such a change: that is the floor of a comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def last_bits_changed(model: Any) -> Iterator[None]:
    """While held, each value of the embeddings' output is off by a last bit of its dtype (normally distributed).

    The noise is drawn on the CPU from one seed, so that it is the same on every device and each time this is held.
    """
    noise = torch.Generator().manual_seed(0)

    def change(module: Any, inputs: Any, output: Tensor) -> Tensor:
        drawn = torch.randn(output.shape, generator=noise).to(output.device)
        return (output.float() * (1 + torch.finfo(output.dtype).eps * drawn)).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()
