"""Whether a metrics.json holds what is read of it: by other versions, by hand, or half of it, it may be anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.metrics import ARMS, COMPARISONS

Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A mapping of any keys, whose values are all of one form."""

    form: Any


@dataclass(frozen=True)
class Maybe:
    """Null, or of that form."""

    form: Any


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


_WORDS: Mapping[Check, str] = {
    _is_number: "a finite number", _is_text: "a text", _is_switch: "true or false",
}  # fmt: skip
_NUMBER = Maybe(_is_number)
_BOUNDS = {"low": _NUMBER, "high": _NUMBER}
_VALUE = {"value": _NUMBER, **_BOUNDS}
_TESTED = {**_VALUE, "p": _NUMBER, "p_holm": _NUMBER}
_ARM = {
    "loss": _NUMBER, "accuracy": _NUMBER, "loss_interval": _BOUNDS, "accuracy_interval": _BOUNDS,
    "simulated": _is_switch,
}  # fmt: skip
_PAIRS = [f"{a}_vs_{b}" for a, b in COMPARISONS]
_COST = {
    "prefill_tokens_per_s": _is_number, "decode_ms": Each(_is_number), "peak_mib": _NUMBER,
}  # fmt: skip
_KL = {
    f"{arm}{part}": _BOUNDS if part.endswith("_interval") else _NUMBER
    for arm in ("ptq", "final")
    for part in ("", "_interval", "_top1", "_top1_interval")
}
READ: Mapping[str, Any] = {
    **dict.fromkeys(ARMS, _ARM),
    "n_samples": _NUMBER,
    "train_ship_gap": _NUMBER,
    "recovered": _NUMBER,
    "recovered_interval": _BOUNDS,
    "kl": {"reference": Maybe(_is_text), "simulated": _is_switch, **_KL},
    "tasks": Each(
        {
            "metric": Maybe(_is_text), "higher_is_better": _is_switch, "share": _is_switch, "n_samples": _is_number,
            **dict.fromkeys(ARMS, _VALUE), "comparisons": dict.fromkeys(_PAIRS, _TESTED),
        }
    ),
    "tasks_mean": {"n_tasks": _is_number, **dict.fromkeys(ARMS, _VALUE)},
    "sqnr": {"median_db": _NUMBER, "worst_db": _NUMBER, "worst_layer": Maybe(_is_text)},
    "layers": Each({"sqnr_db": _NUMBER}),
    "size": dict.fromkeys(("base_mib", "tuned_mib", "final_mib"), _NUMBER),
    "cost": dict.fromkeys(("tuned", "final", "ratio"), Maybe(_COST)),
    "coverage": {"quantized_fraction": _NUMBER, "skipped": Each(_is_text)},
    "scheme": Maybe(_is_text),
    "target": Maybe(_is_text),
    "dtype": _is_text,
    "simulated": _is_switch,
    "why": Each(_is_text),
}  # fmt: skip
"""The parts of `quantize.metrics.build_metrics` that `quantize compare` reads, and their forms."""


def find_faults(metrics: Mapping[str, Any]) -> list[str]:
    """What is not as `build_metrics` writes it, in words: "recovered is missing", "kl.final is no finite number"."""
    return list(_faults(READ, metrics, ""))


def _faults(form: Any, value: Any, key: str) -> Iterator[str]:
    if isinstance(form, Maybe):
        if value is not None:
            yield from _faults(form.form, value, key)
    elif callable(form):
        if not form(value):
            yield f"{key} is not {_WORDS[form]}"
    elif not isinstance(value, Mapping):
        yield f"{key} is no mapping"
    elif isinstance(form, Each):
        for name, each in value.items():
            yield from _faults(form.form, each, f"{key}.{name}")
    else:
        for name, part in form.items():
            path = f"{key}.{name}" if key else name
            if name in value:
                yield from _faults(part, value[name], path)
            else:
                yield f"{path} is missing"
