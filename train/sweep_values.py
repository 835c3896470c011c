"""What a parameter of a sweep may be: W&B's distributions, each drawn from through Optuna.

A range is drawn from as W&B draws from it: `round(x / q) * q` for the quantised ones, exponents for `log_uniform`.
Normal distributions are cut at three standard deviations, so that every value can be checked beforehand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Trial

_LARGEST_EXPONENT = 700
_TAIL = NormalDist().cdf(-3.0)


@dataclass(frozen=True)
class Choices:
    """One of several values."""

    values: tuple[Any, ...]

    def draw(self, trial: Trial, key: str) -> Any:
        """The value that Optuna chooses; it takes no lists, so the choices are JSON."""
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in self.values]))

    def drawn(self, value: Any) -> Any:
        """What Optuna chooses where the value is this."""
        return json.dumps(value)

    def probes(self) -> tuple[Any, ...]:
        """Values that are checked beforehand: all."""
        return self.values


@dataclass(frozen=True)
class Weighted:
    """One of several values, each with a probability."""

    values: tuple[Any, ...]
    probabilities: tuple[float, ...]

    def draw(self, trial: Trial, key: str) -> Any:
        """The value that Optuna chooses: it draws a number from 0 to 1, of which each value has its share."""
        chosen, total = trial.suggest_float(key, 0.0, 1.0), 0.0
        for value, probability in zip(self.values, self.probabilities, strict=True):
            total += probability
            if chosen < total:
                return value
        return self.values[-1]

    def probes(self) -> tuple[Any, ...]:
        """Values that are checked beforehand: all."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A number between two bounds.

    Attributes:
        low, high: of what is drawn.
        log: drawn with equal probability in each decade.
        whole: only whole numbers.
        normal: (mean, standard deviation) where what is drawn is a share of a normal distribution.
        exponential: the value is e to the power of that.
        step: the value is rounded to multiples of it.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False
    normal: tuple[float, float] | None = None
    exponential: bool = False
    step: float | None = None

    def draw(self, trial: Trial, key: str) -> int | float:
        """The value that Optuna chooses."""
        if self.whole:
            return trial.suggest_int(key, int(self.low), int(self.high))
        return self.value(trial.suggest_float(key, self.low, self.high, log=self.log))

    def drawn(self, value: Any) -> Any:
        """What Optuna chooses where the value is this whole number."""
        return value

    def value(self, drawn: float) -> int | float:
        """The parameter's value, of what is drawn."""
        if self.whole:
            return int(drawn)
        value = drawn
        if self.normal is not None:
            value = NormalDist(*self.normal).inv_cdf(value)
        if self.exponential:
            value = math.exp(value)
        return value if self.step is None else round(value / self.step) * self.step

    def probes(self) -> tuple[Any, ...]:
        """Values that are checked beforehand: both ends."""
        return self.value(self.low), self.value(self.high)


Values = Choices | Weighted | Range


def listed(values: Values) -> Sequence[Any] | None:
    """All values, where they can be listed."""
    if isinstance(values, (Choices, Weighted)):
        return values.values
    return range(int(values.low), int(values.high) + 1) if values.whole else None


class Malformed(ValueError):
    """A parameter that cannot be read; the text says why."""


_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    **dict.fromkeys(("log_uniform", "log_uniform_values"), ("min", "max")),
    **dict.fromkeys(("inv_log_uniform", "inv_log_uniform_values"), ("min", "max")),
    **dict.fromkeys(("q_log_uniform", "q_log_uniform_values"), ("min", "max", "q")),
    **dict.fromkeys(("normal", "log_normal"), ("mu", "sigma")),
    **dict.fromkeys(("q_normal", "q_log_normal"), ("mu", "sigma", "q")),
}
"""The keys of each distribution."""
_DEFAULTS = {"q": 1.0, "mu": 0.0, "sigma": 1.0}


def read_values(given: Mapping[str, Any], *, grid: bool) -> Values:
    """What a parameter may be, from its mapping in the file.

    Args:
        grid: the method is grid, for which a stepped range is a list.

    Raises:
        Malformed: with the reason.
    """
    name = given.get("distribution") or _implied(given)
    if name in ("beta", "q_beta"):
        raise Malformed(f"distribution {name} is not offered here; use uniform, normal, or a list of values")
    if name not in _ALLOWED:
        raise Malformed(f"unknown distribution {name!r}; choose from {', '.join(_ALLOWED)}")
    unknown = [key for key in given if key not in ("distribution", *_ALLOWED[name])]
    if unknown:
        raise Malformed(f"{', '.join(unknown)} has no meaning with {name}, which takes {', '.join(_ALLOWED[name])}")
    missing = [key for key in _ALLOWED[name] if key not in given and key not in _DEFAULTS]
    if missing:
        raise Malformed(f"{name} needs {' and '.join(missing)}")
    if name == "constant":
        return Choices((given["value"],))
    if grid and name == "categorical_w_probabilities":
        raise Malformed("a grid takes each value once; leave probabilities out")
    if name.startswith("categorical"):
        return _read_choices(given)
    numbers = {key: given.get(key, _DEFAULTS.get(key)) for key in _ALLOWED[name]}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Malformed(f"{key} is {value!r}; expected a number")
    return _read_range(name, {key: value for key, value in numbers.items() if value is not None}, grid=grid)


def _implied(given: Mapping[str, Any]) -> str:
    """The distribution that W&B takes where none is named."""
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical_w_probabilities" if "probabilities" in given else "categorical"
    if "min" in given or "max" in given:
        whole = all(isinstance(given.get(key), int) for key in ("min", "max"))
        return "int_uniform" if whole else "uniform"
    raise Malformed("expected value, values, min and max, or parameters")


def _read_choices(given: Mapping[str, Any]) -> Choices | Weighted:
    values = given["values"]
    if not isinstance(values, list) or not values:
        raise Malformed("values is no list with at least one value")
    written = [json.dumps(value, default=str) for value in values]
    twice = next((text for text in written if written.count(text) > 1), None)
    if twice is not None:
        raise Malformed(f"values has {twice} twice")
    if "probabilities" not in given:
        return Choices(tuple(values))
    shares = given["probabilities"]
    right = isinstance(shares, list) and len(shares) == len(values)
    if not right or any(isinstance(each, bool) or not isinstance(each, (int, float)) or each < 0 for each in shares):
        raise Malformed("probabilities is no list of one number >= 0 for each value")
    if abs(sum(shares) - 1) > 1e-6:
        raise Malformed(f"probabilities sum to {sum(shares):g}, not 1")
    return Weighted(tuple(values), tuple(float(share) for share in shares))


def _read_range(name: str, numbers: Mapping[str, float], *, grid: bool) -> Choices | Range:
    step = numbers.get("q")
    if step is not None and step <= 0:
        raise Malformed(f"q is {step:g}; expected a number above 0")
    if name.endswith("normal"):
        if numbers["sigma"] <= 0:
            raise Malformed(f"sigma is {numbers['sigma']:g}; expected a number above 0")
        of = (float(numbers["mu"]), float(numbers["sigma"]))
        return Range(_TAIL, 1 - _TAIL, normal=of, exponential="log" in name, step=step)
    low, high = numbers["min"], numbers["max"]
    if low >= high:
        raise Malformed(f"min is {low:g} and max is {high:g}; min must be less")
    if name == "int_uniform":
        if not (isinstance(low, int) and isinstance(high, int)):
            raise Malformed("int_uniform needs whole numbers")
        return Range(low, high, whole=True)
    if "log" in name and name.endswith("values"):
        if low <= 0:
            raise Malformed(f"min is {low:g}; {name} needs min above 0")
        return Range(low, high, log=True, step=step)
    if "log" in name:  # the bounds are exponents
        if max(abs(low), abs(high)) > _LARGEST_EXPONENT:
            raise Malformed(f"min and max of {name} are exponents of e; bounds of the value are {name}_values")
        ends = (-high, -low) if name.startswith("inv") else (low, high)
        return Range(math.exp(ends[0]), math.exp(ends[1]), log=True, step=step)
    if grid and step is not None:  # as W&B's grid: without its end
        return Choices(tuple(low + step * number for number in range(math.ceil((high - low) / step))))
    return Range(low, high, step=step)
