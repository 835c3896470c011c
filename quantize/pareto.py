"""Loss and accuracy against size: which models no other beats in both.

Arms that are simulated have no file to weigh. They stand at the nominal size of their format, hollow, where that is
known, and are named in the caption where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.drawing import (
    COLOURS,
    GREY,
    MARKERS,
    Plot,
    bar_lengths,
    draw_figure,
    figure_names,
    legend_below,
    legend_height,
    spelled_out,
)
from quantize.metrics import ARMS, QUANTISED_ARMS
from quantize.schemes import SCHEMES
from quantize.verdict import why

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Mapping[str, Any]
Value = Mapping[str, float | None]  # value, low, high

_LOOKS = {
    "base": ("#777777", "o"), "base_quantized": ("#9a5fb0", "s"), "control": ("#3c8d5a", "o"),
    "ptq": ("#c8641b", "s"), "tuned": ("#2a93a8", "^"), "final": ("#2f6db5", "D"),
}  # fmt: skip
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
_BESIDE = 0.025  # of the axis, between markers of one size


@dataclass(frozen=True)
class Point:
    """A model in the planes of size and loss, and of size and accuracy.

    Attributes:
        size: MiB; None = not known, for `reason`.
        nominal: the size is computed, not weighed.
        loss: nats per answer token. score: a share from 0 to 1.
        look: colour and marker.
    """

    name: str
    size: float | None
    nominal: bool
    loss: Value
    score: Value
    look: tuple[str, str]
    reason: str = ""


def arm_points(metrics: Metrics, nominal: float | None = None) -> list[Point]:
    """The arms of one run that were measured; `nominal`: MiB of the quantised ones where no file was written."""
    tasks = scored_by_tasks(metrics)
    return [_point(arm, metrics, arm, nominal, tasks, _LOOKS[arm]) for arm in ARMS if metrics[arm]["loss"] is not None]


def run_point(name: str, metrics: Metrics, arm: str, nominal: float | None, tasks: bool, number: int) -> Point:
    """One run, as it ships, as the one of that number among several; `tasks`: scored by the mean of its tasks."""
    look = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return _point(name, metrics, arm, nominal, tasks, look)


def scored_by_tasks(metrics: Metrics) -> bool:
    """Whether tasks give a mean score; where not, accuracy is that of exact answers on held-out samples."""
    return any(metrics["tasks_mean"][arm]["value"] is not None for arm in ARMS)


def nominal_mib(gathered: Mapping[str, Any], tuned_mib: float | None) -> float | None:
    """MiB of the run's format without a file: each quantised weight at its stored bits and a 16-bit scale a group.

    Args:
        gathered: what the run measured (see `train.stages.Stages.report`).
        tuned_mib: of the merged checkpoint.

    Returns:
        None where nothing is quantised, or the share of the weights that would be is not known.
    """
    form = gathered.get("format") or {}
    scheme, bits = SCHEMES.get(form.get("scheme", "")), _BITS.get(gathered.get("dtype", ""))
    places = (gathered.get(part) or {} for part in ("shipped", "tuned"))
    coverage: Mapping[str, Any] = next((place["coverage"] for place in places if place.get("coverage")), {})
    share = coverage.get("share_of_all_weights")
    # A scheme that quantises the embedding unties it: the weights are no longer those of the merged checkpoint.
    if scheme is None or scheme.embedding is not None or bits is None or share is None or tuned_mib is None:
        return None
    group, target = form.get("group_size"), scheme.targets.get(form.get("target", ""))
    stored = scheme.bits if target is None or target.stored_bits is None else target.stored_bits
    return float(tuned_mib * (1 - share + share * (stored + (16 / group if group else 0)) / bits))


def draw_sizes(points: Sequence[Point], by_tasks: bool) -> Plot | None:
    """Two panels over one axis of sizes; None where fewer than two models have one."""
    placed = [point for point in points if point.size is not None]
    if len(placed) < 2:
        return None
    legend, columns = legend_height([point.name for point in placed])

    def draw(figure: Figure) -> bool:
        above, below = figure.subplots(2, 1, sharex=True)
        names = figure_names([point.name for point in placed])
        _panel(above, placed, [point.loss for point in placed], names, 1)
        _panel(below, placed, [point.score for point in placed], [""] * len(placed), -100)
        above.set_ylabel("nats per answer token")
        below.set_ylabel("mean of the tasks, %" if by_tasks else "exact match, %")
        below.set_xlabel("MiB on disk")
        below.set_xlim(0, 1.1 * max(point.size or 0.0 for point in placed))
        handles, _ = above.get_legend_handles_labels()
        legend_below(figure, len(placed), columns, handles)
        return True

    return draw_figure("size", _caption(points, by_tasks), 4.6 + legend, draw)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (size, cost) that no other beats in one and equals in the other, by size."""
    kept: list[tuple[float, float]] = []
    for size, cost in sorted(points):
        if not kept or cost < kept[-1][1]:
            kept.append((size, cost))
    return kept


def _point(name: str, metrics: Metrics, arm: str, nominal: float | None, tasks: bool, look: tuple[str, str]) -> Point:
    key = "final_mib" if arm in QUANTISED_ARMS else "base_mib" if arm == "base" else "tuned_mib"
    size, found = metrics["size"][key], metrics[arm]
    simulated = arm in QUANTISED_ARMS and found["simulated"]
    exact = {"value": found["accuracy"], **found["accuracy_interval"]}
    return Point(
        name=name,
        size=nominal if size is None and simulated else size,
        nominal=size is None and simulated,
        loss={"value": found["loss"], **found["loss_interval"]},
        score=metrics["tasks_mean"][arm] if tasks else exact,
        look=look,
        reason=why(metrics, f"size.{key}"),
    )


def _panel(axes: Axes, points: Sequence[Point], values: Sequence[Value], names: Sequence[str], factor: float) -> None:
    """Points with their intervals and the front; a negative factor = more is better, shown positive."""
    scale, width = abs(factor), max(point.size or 0.0 for point in points)
    known = [
        (point.size, factor * value["value"])
        for point, value in zip(points, values, strict=True)
        if point.size is not None and value["value"] is not None
    ]
    steps = front(known)
    if steps:
        sizes, heights = zip(*steps, (1.1 * width, steps[-1][1]), strict=True)
        shown = [height if factor > 0 else -height for height in heights]
        axes.step(sizes, shown, where="post", color=GREY, lw=1, ls="--", zorder=1)
    for point, value, name, shift in zip(points, values, names, _beside(points, width), strict=True):
        if point.size is None or value["value"] is None:
            continue
        low, high = (None if value[key] is None else scale * value[key] for key in ("low", "high"))  # type: ignore[operator]
        colour, marker = point.look
        axes.errorbar(
            point.size + shift, scale * value["value"], yerr=bar_lengths(scale * value["value"], low, high),
            fmt=marker, color=colour, mfc="white" if point.nominal else colour, capsize=2, ms=6, label=name or None,
        )  # fmt: skip


def _beside(points: Sequence[Point], width: float) -> list[float]:
    """How far each marker moves sideways, so that those of one size do not lie on each other."""
    near = [
        [other for other, each in enumerate(points) if abs((each.size or 0.0) - (point.size or 0.0)) < 0.03 * width]
        for point in points
    ]
    return [_BESIDE * width * (group.index(number) - (len(group) - 1) / 2) for number, group in enumerate(near)]


def _caption(points: Sequence[Point], by_tasks: bool) -> str:
    score = "mean score of the tasks" if by_tasks else "exact match on held-out samples"
    text = (
        f"Held-out loss (lower is better) and {score} (higher is better) against size on disk, 95% intervals. Dashed: "
        "the front, of what no other beats in both. Markers of one size stand side by side"
    )
    text += spelled_out([point.name for point in points if point.size is not None])
    if nominal := [point.name for point in points if point.nominal and point.size is not None]:
        text += f". Hollow, at the nominal size of the format, as no file is written: {', '.join(nominal)}"
    for reason in dict.fromkeys(point.reason for point in points if point.size is None):
        names = [point.name for point in points if point.size is None and point.reason == reason]
        text += f". Not drawn, as the size is not known: {', '.join(names)} ({reason})"
    if missing := [point.name for point in points if point.score["value"] is None and point.size is not None]:
        text += f". Without a {score}: {', '.join(missing)}"
    return text
