"""The report's figures, drawn by matplotlib: training loss, accuracy against size, forest plot, SQNR by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from quantize.arms import task_unit
from quantize.drawing import (
    BLUE,
    ROW,
    Plot,
    bar_lengths,
    draw_figure,
    draw_intervals,
    figure_names,
    legend_below,
    legend_height,
    spelled_out,
)
from quantize.pareto import arm_points, draw_sizes, scored_by_tasks
from quantize.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Plot", "draw_plots", "draw_sensitivity", "main_pair"]

_CONTROL = "#3c8d5a"
_FURTHEST = 5.0  # nats between two perplexities whose ratio, 148, can still be drawn in %
_MOST_POINTS = 600  # more than the picture has pixels helps nobody and makes the page heavy

Losses = Mapping[str, Sequence[tuple[float, float]]]


def draw_plots(metrics: Mapping[str, Any], losses: Losses, nominal_mib: float | None = None) -> list[Plot]:
    """The figures that these metrics have the numbers for, in the report's order.

    Args:
        nominal_mib: size of what is simulated and has no file (see `quantize.pareto.nominal_mib`).
    """
    curves = {{"tuned": "this run", "control": "control (without QAT)"}.get(arm, arm): points
              for arm, points in losses.items()}  # fmt: skip
    colours = {"this run": BLUE, "control (without QAT)": _CONTROL}
    rows = forest_rows(metrics)
    sqnr = "SQNR of each quantised layer's output, by depth: low is where it hurts"
    drawn = (
        draw_figure("loss", "Training loss by step", 2.6, partial(draw_curves, losses=curves, colours=colours)),
        draw_sizes(arm_points(metrics, nominal_mib), scored_by_tasks(metrics)),
        draw_figure("forest", _forest_caption(metrics, rows), forest_height(rows), partial(_forest, rows=rows)),
        draw_figure("sqnr", sqnr, 3.0, partial(_sqnr, metrics=metrics)),
    )
    return [plot for plot in drawn if plot is not None]


def draw_sensitivity(found: Mapping[str, Any]) -> list[Plot]:
    """The divergence of each group of layers, by block along the depth and by kind (see `quantize.sensitivity`)."""
    drawn = []
    for way, draw in (("block", _blocks_depth), ("kind", _kinds)):
        rows = [row for row in found["groups"] if row["way"] == way]
        height = 3.0 if way == "block" else 0.9 + ROW * len(rows)
        caption = f"KL divergence from the unquantised model with one {way} quantised, nats a token, 95% intervals"
        drawn.append(draw_figure(way, caption, height, partial(draw, rows=rows)))
    return [plot for plot in drawn if plot is not None]


def draw_curves(figure: Figure, losses: Losses, colours: Mapping[str, str], below: bool = False) -> bool:
    """Training losses by step, a line a name; a name that has fewer than two is left out.

    Args:
        below: set the legend below the axes, as names are long or many.
    """
    axes = figure.add_subplot()
    drawn = False
    for label, (name, points) in zip(figure_names(list(losses)), losses.items(), strict=True):
        finite = [(step, loss) for step, loss in points if math.isfinite(step) and math.isfinite(loss)]
        if len(finite) < 2:
            continue
        stride = math.ceil(len(finite) / _MOST_POINTS)
        shown = [*finite[:-1:stride], finite[-1]]
        axes.plot(*zip(*shown, strict=True), color=colours.get(name), label=label, lw=1.3)
        drawn = True
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    if drawn and below:
        _, columns = legend_height(list(losses))
        legend_below(figure, len(losses), columns)
    elif drawn:
        axes.legend(frameon=False)
    return drawn


@dataclass(frozen=True)
class ForestRows:
    """What a forest plot shows: (label, difference), positive is better.

    Attributes:
        points: in percentage points.
        relative: of tasks in units of their own, in % of the reference's value.
        left_out: what cannot be drawn, with its reason.
    """

    points: Sequence[tuple[str, Interval]]
    relative: Sequence[tuple[str, Interval]]
    left_out: Sequence[str]


def forest_rows(metrics: Mapping[str, Any]) -> ForestRows:
    """Differences of `main_pair`: held-out answers, the mean of the tasks, then each task."""
    first, second = main_pair(metrics)
    pair, mean = f"{first}_vs_{second}", metrics["tasks_mean"]
    points: list[tuple[str, Interval]] = []
    relative: list[tuple[str, Interval]] = []
    left_out: list[str] = []
    for name, found in (
        ("held-out, exact", metrics["comparisons"][pair]["accuracy"]),
        (f"mean of {mean['n_tasks']} tasks", mean["comparisons"][pair]),
    ):
        if found["low"] is not None and found["high"] is not None:
            points.append((name, _scaled(found, 100)))
    for name, task in metrics["tasks"].items():
        row, reason = task_row(task, task["comparisons"][pair], task[second]["value"])
        if row is None:
            left_out.append(f"{name} ({reason})")
        else:
            (points if task["share"] else relative).append((name, row))
    return ForestRows(points, relative, left_out)


def task_row(
    task: Mapping[str, Any], found: Mapping[str, float | None], reference: float | None
) -> tuple[Interval | None, str]:
    """A task's difference in percentage points, or in % of `reference` where its metric is no share; or why not.

    Of a text it is that of the perplexity, whose logarithm the metric is.
    """
    if task["metric"] is None:
        return None, "no metric of a sample"
    if found["value"] is None:
        return None, "not run"
    if found["low"] is None or found["high"] is None:
        return None, "too few samples, or too few that differ, for an interval"
    if task["share"]:
        return _scaled(found, 100), ""
    if task_unit(task) != task["metric"]:
        if max(abs(float(found[key] or 0.0)) for key in ("value", "low", "high")) > _FURTHEST:
            return None, "perplexities too far apart to draw"
        ratios = [100 * (1 - math.exp(float(found[key] or 0.0))) for key in ("value", "low", "high")]
        return Interval(ratios[0], min(ratios), max(ratios)), ""
    if not reference:
        return None, "there is no % of 0"
    return _scaled(found, (100 if task["higher_is_better"] else -100) / abs(reference)), ""


def _scaled(found: Mapping[str, float | None], factor: float) -> Interval:
    value, *bounds = (factor * float(found[key] or 0.0) for key in ("value", "low", "high"))
    return Interval(value, min(bounds), max(bounds))


def main_pair(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """The two arms that say what quantisation costs; where nothing is quantised, what the fine-tuning gained."""
    if metrics["final"]["loss"] is None:
        return "tuned", "base"
    return "final", "control" if metrics["control"]["loss"] is not None else "tuned"


def _forest_caption(metrics: Mapping[str, Any], rows: ForestRows) -> str:
    first, second = main_pair(metrics)
    text = f"{first} minus {second}, percentage points, paired 95% intervals: right is better"
    if rows.relative:
        text += relative_caption(second)
    text += spelled_out([name for name, _ in (*rows.points, *rows.relative)])
    return text + left_out_caption(rows.left_out)


def relative_caption(reference: str) -> str:
    """What the second panel of a forest plot shows."""
    return (
        f". Below, metrics that are no shares: the difference in % of {reference}'s value (of a text, its "
        "perplexity), the sign turned where less is better, so that right is better there, too"
    )


def left_out_caption(left_out: Sequence[str]) -> str:
    """The tasks that a figure cannot show."""
    return f". Not drawn: {', '.join(left_out)}" if left_out else ""


def forest_height(rows: ForestRows) -> float:
    """Inches."""
    panels = [len(part) for part in (rows.points, rows.relative) if part]
    return sum(0.9 + ROW * count for count in panels) or 1.0


def _forest(figure: Figure, rows: ForestRows) -> bool:
    panels = [
        (part, label)
        for part, label in ((rows.points, "percentage points"), (rows.relative, "% of the reference"))
        if part
    ]
    if not panels:
        return False
    heights = [0.9 + ROW * len(part) for part, _ in panels]
    grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axes, (part, label) in zip(grid[:, 0], panels, strict=True):
        axes.set_xlabel(label)
        draw_intervals(axes, part)
    return True


def _sqnr(figure: Figure, metrics: Mapping[str, Any]) -> bool:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    kinds: dict[str, list[tuple[int, float]]] = {}
    for depth, name, decibels in by_depth(metrics["layers"]):
        kinds.setdefault(name, []).append((depth, decibels))
    markers = "osD^v<>P*X"
    for number, (label, points) in enumerate(zip(figure_names(list(kinds)), kinds.values(), strict=True)):
        axes.plot(*zip(*points, strict=True), marker=markers[number % len(markers)], ms=4, lw=1, label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel("output SQNR, dB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if kinds:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return bool(kinds)


def _blocks_depth(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> bool:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    depths = [(int(found[-1]), row["kl"]) for row in rows if (found := re.findall(r"\.(\d+)$", row["name"]))]
    for depth, kl in sorted(depths, key=lambda each: each[0]):
        lengths = bar_lengths(kl["value"], kl["low"], kl["high"])
        axes.errorbar(depth, kl["value"], yerr=lengths, fmt="o", color=BLUE, capsize=2, ms=4)
    axes.set_xlabel("block")
    axes.set_ylabel("nats a token")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return bool(depths)


def _kinds(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> bool:
    axes = figure.add_subplot()
    axes.set_xlabel("nats a token")
    found = [(row["name"], Interval(*(row["kl"][key] for key in ("value", "low", "high")))) for row in rows]
    return draw_intervals(
        axes, [(name, each) for name, each in found if each.low is not None and each.high is not None]
    )


def by_depth(layers: Mapping[str, Any]) -> Iterator[tuple[int, str, float]]:
    """(number of the block, kind of layer, dB); a layer outside the blocks stands at the depth where it was met."""
    depth = 0
    for name, health in layers.items():
        numbers = re.findall(r"\.(\d+)\.", name)
        depth = int(numbers[0]) if numbers else depth
        if health["sqnr_db"] is not None:
            yield depth, name.rsplit(".", 1)[-1], health["sqnr_db"]
