"""The report's table as rows, and how its numbers are written: shared by report, console and trackers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.metrics import ARMS

_DESCRIPTIONS = {
    "base": "untouched",
    "base_quantized": "untouched, quantised",
    "control": "fine-tuned without QAT",
    "ptq": "control, quantised after training",
    "tuned": "this run, merged in {dtype}",
    "final": "this run, as shipped",
}
_PERPLEXITIES = {"nats per word": "word perplexity", "nats per byte": "byte perplexity"}
_LARGEST = 50.0  # nats of which a perplexity is shown
_SIZE_OF = {"base": "base_mib", "control": "tuned_mib", "tuned": "tuned_mib"}  # quantised arms: final_mib, same layout


@dataclass(frozen=True)
class ArmRow:
    """One line of the report's table; `vs_base` values are `{value, low, high}` with None where unknown."""

    name: str
    description: str
    loss: float
    loss_vs_base: Mapping[str, float | None]
    accuracy: float
    accuracy_vs_base: Mapping[str, float | None]
    size_mib: float | None
    simulated: bool


def arm_rows(metrics: Mapping[str, Any]) -> list[ArmRow]:
    """The arms that were measured, in the report's order."""
    return [
        ArmRow(
            name=name,
            description=_DESCRIPTIONS[name].format(dtype=metrics["dtype"])
            + (" (simulated)" if metrics[name]["simulated"] else ""),
            loss=metrics[name]["loss"],
            loss_vs_base=metrics[name]["vs_base"]["loss"],
            accuracy=metrics[name]["accuracy"],
            accuracy_vs_base=metrics[name]["vs_base"]["accuracy"],
            size_mib=metrics["size"][_SIZE_OF.get(name, "final_mib")],
            simulated=metrics[name]["simulated"],
        )
        for name in ARMS
        if metrics[name]["loss"] is not None
    ]


def format_loss(loss: float) -> str:
    """Nats per answer token."""
    return f"{loss:.4f}"


def format_accuracy(accuracy: float) -> str:
    """Share of exact answers in percent."""
    return f"{accuracy:.1%}"


def format_difference(interval: Mapping[str, float | None]) -> str:
    """`-0.2017 [-0.2500, -0.1500]`; a dash where unknown."""
    return _with_interval(interval, 1, 4)


def format_points(interval: Mapping[str, float | None]) -> str:
    """A difference of accuracies in percentage points, `+3.5 [-0.5, +7.6]`."""
    return _with_interval(interval, 100, 1)


def format_value(interval: Mapping[str, float | None], digits: int, *, factor: float = 1) -> str:
    """A value that is no difference, `0.0120 [0.0101, 0.0142]`; a dash where unknown."""
    return _with_interval(interval, factor, digits, sign="")


def format_divergence(interval: Mapping[str, float | None], sign: str = "", digits: int = 3) -> str:
    """Digits that count, `0.0226 [0.0183, 0.028]`: divergences and perplexities span decades."""
    value, low, high = interval["value"], interval["low"], interval["high"]
    if value is None:
        return "-"
    style = f"{sign}.{digits}g"
    bounds = "" if low is None or high is None else f" [{low:{style}}, {high:{style}}]"
    return f"{value:{style}}{bounds}"


def task_unit(task: Mapping[str, Any]) -> str:
    """What a task's scores are shown in: of a text its perplexity, exp of its nats per word or byte."""
    return _PERPLEXITIES.get(task["metric"] or "", task["metric"] or "-")


def format_score(task: Mapping[str, Any], found: Mapping[str, float | None]) -> str:
    """An arm's score: a share in percent, a perplexity, or as it is; with its interval where `found` has one."""
    if task["metric"] in _PERPLEXITIES:
        known = _exp(found)
        return f"{format_divergence(found, digits=5)} nats" if known is None else format_divergence(known, digits=5)
    return format_value(found, 1, factor=100) if task["share"] else format_value(found, 4)


def format_score_difference(task: Mapping[str, Any], found: Mapping[str, float | None]) -> str:
    """How two arms differ: in percentage points, of perplexities as a ratio `x1.034 [1.010, 1.060]`, or as it is."""
    if task["metric"] in _PERPLEXITIES:
        known = _exp(found)
        if known is None:
            return f"{format_divergence(found, '+', 5)} nats"
        return "-" if found["value"] is None else f"x{format_divergence(known, digits=5)}"
    return format_points(found) if task["share"] else format_difference(found)


def _exp(found: Mapping[str, float | None]) -> dict[str, float | None] | None:
    """Of a value and its bounds; None where one is beyond what can be read: a text without spaces is one long word."""
    if any(each is not None and abs(each) > _LARGEST for each in found.values()):
        return None
    return {key: None if each is None else math.exp(each) for key, each in found.items()}


def format_size(mib: float | None) -> str:
    """MiB, a dash where unknown."""
    return "-" if mib is None else f"{mib:,.1f}"


def _with_interval(interval: Mapping[str, float | None], factor: float, digits: int, sign: str = "+") -> str:
    value, low, high = interval["value"], interval["low"], interval["high"]
    if value is None:
        return "-"
    style = f"{sign}.{digits}f"
    bounds = "" if low is None or high is None else f" [{low * factor:{style}}, {high * factor:{style}}]"
    return f"{value * factor:{style}}{bounds}"
