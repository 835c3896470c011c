"""The parameters of a sweep: their points, and how a point reaches the command line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.sweep_values import Choices, Values, Weighted, listed

if TYPE_CHECKING:
    from optuna import Trial

LARGEST = 1000
"""Combinations up to which each is checked before anything runs."""


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        path: its names in the file, one for each `parameters:` around it: ("train.learning_rate",), or
            ("train", "learning_rate").
        values: what it may be.
        place: file and line, for messages.
    """

    path: tuple[str, ...]
    values: Values
    place: str

    @property
    def key(self) -> str:
        """The dotted key of the config."""
        return ".".join(self.path).replace("-", "_")

    @property
    def constant(self) -> bool:
        """It has one value only."""
        return isinstance(self.values, Choices) and len(self.values.values) == 1


@dataclass(frozen=True)
class Space:
    """All parameters of a sweep. A point is a value for each, by `Parameter.key`."""

    parameters: tuple[Parameter, ...]

    @property
    def varied(self) -> tuple[Parameter, ...]:
        """Those with more than one value."""
        return tuple(each for each in self.parameters if not each.constant)

    @property
    def size(self) -> int | None:
        """How many points there are; None where a parameter is a number of a range."""
        lists = [listed(each.values) for each in self.parameters]
        return None if None in lists else math.prod(len(each) for each in lists if each is not None)

    def points(self) -> Iterator[dict[str, Any]]:
        """All points, the last parameter varied first. Only where `size` is known."""
        keys = [each.key for each in self.parameters]
        for values in itertools.product(*(listed(each.values) or () for each in self.parameters)):
            yield dict(zip(keys, values, strict=True))

    def probes(self) -> Iterator[dict[str, Any]]:
        """Points to check: all where they are few, else each value and each end in turn, the others at their first."""
        if self.size is not None and self.size <= LARGEST:
            yield from self.points()
            return
        first = {each.key: each.values.probes()[0] for each in self.parameters}
        yield first
        for each in self.parameters:
            yield from (first | {each.key: value} for value in each.values.probes()[1:])

    def draw(self, trial: Trial) -> dict[str, Any]:
        """The point that Optuna chooses; of a trial that was begun, the same again."""
        return {
            each.key: each.values.probes()[0] if each.constant else each.values.draw(trial, each.key)
            for each in self.parameters
        }

    def drawn(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """What Optuna chooses where this point of a grid is wanted."""
        return {
            each.key: each.values.drawn(point[each.key])
            for each in self.varied
            if not isinstance(each.values, Weighted)
        }

    def arguments(self, point: Mapping[str, Any]) -> list[str]:
        """The words that W&B's agent puts in the place of `${args}`."""
        whole: dict[str, Any] = {}
        for each in self.parameters:
            *above, last = each.path
            section = whole
            for name in above:
                section = section.setdefault(name, {})
            section[last] = point[each.key]
        return [f"--{name}={value}" for name, value in whole.items()]
