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
    """

    limit: int
    reuse: bool = False
    _held: dict[str, tuple[tuple[Any, ...], list[Weight], bool]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return sum(_bytes(weights) for _, weights, _ in self._held.values())

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
        self._held.pop(name, None)
        if self.size + _bytes(weights) <= self.limit:
            self._held[name] = (state, weights, trains)
        return weights

    def moved(self) -> None:
        """Drops the weights that train: the optimiser has moved them."""
        self._held = {name: entry for name, entry in self._held.items() if not entry[2]}

    def clear(self) -> None:
        """Drops all."""
        self._held.clear()


def _bytes(weights: Sequence[Weight]) -> int:
    tensors: list[Tensor | None] = []
    for weight in weights:
        tensors += (weight,) if isinstance(weight, Tensor) else (weight.values, weight.scale, weight.zero)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
