"""Fake-quantised weights that are needed again: kept within a bound, dropped when what they were made of moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantize.numerics import Quantised

Weight = Tensor | Quantised


@dataclass
class WeightCache:
    """Layer name -> its weight as the product takes it, alone or with those of the layers that share its input.

    Frozen weights stay for good. Those that train are kept only while `reuse` is set, which is for whoever computes
    several batches between two steps of the optimiser.

    Attributes:
        limit: bytes that it may hold.
        reuse: keep the weights that train, too.
        size: bytes that are held, counted as they come and go: there are thousands of weights where experts are fused.
    """

    limit: int
    reuse: bool = False
    size: int = field(default=0, init=False)
    _held: dict[str, tuple[tuple[Any, ...], list[Weight], bool]] = field(default_factory=dict, init=False)

    def fits(self, name: str, size: int) -> bool:
        """Whether a layer's weight is held, or `size` bytes more would be."""
        return name in self._held or self.size + size <= self.limit

    def get(
        self, name: str, parts: Sequence[Tensor | None], options: Any, make: Callable[[], list[Weight]]
    ) -> list[Weight]:
        """The weights that `make` gives, made once for as long as `parts` do not move.

        Args:
            parts: what it is made of: the frozen weight, the adapter's matrices, the range's factor.
            options: what else it depends on.
        """
        trains = any(part is not None and part.requires_grad for part in parts)
        if self.limit == 0 or (trains and not self.reuse) or torch.is_inference_mode_enabled():
            return make()  # what inference mode makes cannot be saved for a backward pass later
        # An optimiser that writes past the version counter is why `moved` has to be called as well.
        state = (options, *((part.data_ptr(), part._version) if part is not None else None for part in parts))
        found = self._held.get(name)
        if found is not None and found[0] == state:
            return found[1]
        weights = make()
        if found is not None:
            self._drop(name)
        if self.size + _bytes(weights) <= self.limit:
            self._held[name] = (state, weights, trains)
            self.size += _bytes(weights)
        return weights

    def moved(self) -> None:
        """Drops the weights that train: the optimiser has moved them."""
        for name in [name for name, (_, _, trains) in self._held.items() if trains]:
            self._drop(name)

    def clear(self) -> None:
        """Drops all."""
        self._held.clear()
        self.size = 0

    def _drop(self, name: str) -> None:
        self.size -= _bytes(self._held.pop(name)[1])


def _bytes(weights: Sequence[Weight]) -> int:
    tensors: list[Tensor | None] = []
    for weight in weights:
        tensors += (weight,) if isinstance(weight, Tensor) else (weight.values, weight.scale, weight.zero)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
