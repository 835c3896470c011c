"""The report's figures, drawn by matplotlib: training loss, accuracy against size, forest plot, SQNR by layer.

Each is made for the width of a phone (about 380 pixels); a wide page sets them side by side.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.arms import arm_rows
from quantize.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 5.2  # inches; at 72 points an inch, so that 9 points of text are 9 pixels at 375 pixels' width
_BLUE, _ORANGE, _GREY = "#2f6db5", "#c8641b", "#777777"
_COLOURS = {
    "base": _GREY,
    "base_quantized": _GREY,
    "control": "#3c8d5a",
    "ptq": _ORANGE,
    "tuned": "#3c8d5a",
    "final": _BLUE,
}
_QUANTISED = ("base_quantized", "ptq", "final")
_MOST_POINTS = 600  # more than the picture has pixels helps nobody and makes the page heavy
_STYLE: dict[str, Any] = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "svg.fonttype": "none", "text.parse_math": False,
    "font.family": "sans-serif", "figure.constrained_layout.use": True,
}  # fmt: skip

Losses = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        name: of its file, and of W&B's panel.
        caption: what it shows, for those who cannot see it too.
        svg: as an element to set into a page. png: the same as an image.
    """

    name: str
    caption: str
    svg: str
    png: bytes


def draw_plots(metrics: Mapping[str, Any], losses: Losses) -> list[Plot]:
    """The figures that these metrics have the numbers for, in the report's order."""
    drawn = (
        _draw("loss", "Training loss by step", _loss_curves, 2.6, losses),
        _draw("size", "Held-out loss against size on disk, 95% intervals", _pareto, 3.0, metrics),
        _draw("forest", _forest_caption(metrics), _forest, 0.9 + 0.34 * len(_differences(metrics)), metrics),
        _draw("sqnr", "SQNR of each quantised layer's output, by depth: low is where it hurts", _sqnr, 3.0, metrics),
    )
    return [plot for plot in drawn if plot is not None]


def draw_comparison(
    runs: Sequence[tuple[str, Mapping[str, Any], str]], differences: Sequence[tuple[str, Interval]], first: str
) -> list[Plot]:
    """Figures over several runs.

    Args:
        runs: (name, metrics, the arm that ships).
        differences: (name, loss minus that of the first run).
    """
    height = 0.9 + 0.34 * len(differences)
    drawn = (
        _draw("size", "Held-out loss against size on disk, 95% intervals", _run_sizes, 3.0, runs),
        _draw("forest", f"Loss minus that of {first}, nats per answer token, paired 95% intervals: left is better",
              _run_forest, height, differences),
    )  # fmt: skip
    return [plot for plot in drawn if plot is not None]


def draw_sensitivity(found: Mapping[str, Any]) -> list[Plot]:
    """The divergence of each group of layers, by block along the depth and by kind (see `quantize.sensitivity`)."""
    drawn = []
    for way, draw in (("block", _blocks_depth), ("kind", _kinds)):
        rows = [row for row in found["groups"] if row["way"] == way]
        height = 3.0 if way == "block" else 0.9 + 0.34 * len(rows)
        caption = f"KL divergence from the unquantised model with one {way} quantised, nats a token, 95% intervals"
        drawn.append(_draw(way, caption, draw, height, rows))
    return [plot for plot in drawn if plot is not None]


def _draw(name: str, caption: str, draw: Any, height: float, data: Any) -> Plot | None:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):  # the salt keeps ids of figures in one page apart
        figure = Figure(figsize=(_WIDTH, height))
        if not draw(figure.add_subplot(), data):
            return None
        return Plot(name, caption, _svg(figure, caption), _png(figure))


def _svg(figure: Figure, caption: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    element = text[text.index("<svg") :]
    # Scaled by its viewBox to the page's width; the caption is its name for screen readers.
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    label = caption.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub("<metadata>.*?</metadata>", "", element, flags=re.DOTALL).replace(
        "<svg ", f'<svg role="img" aria-label="{label}" ', 1
    )


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160, facecolor="white")
    return stream.getvalue()


def _loss_curves(axes: Axes, losses: Losses) -> bool:
    drawn = False
    for arm, points in losses.items():
        finite = [(step, loss) for step, loss in points if math.isfinite(step) and math.isfinite(loss)]
        if len(finite) < 2:
            continue
        stride = math.ceil(len(finite) / _MOST_POINTS)
        shown = [*finite[:-1:stride], finite[-1]]
        label = {"tuned": "this run", "control": "control (without QAT)"}.get(arm, arm)
        axes.plot(*zip(*shown, strict=True), color=_COLOURS.get(arm) if arm != "tuned" else _BLUE, label=label, lw=1.3)
        drawn = True
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    if drawn:
        axes.legend(frameon=False)
    return drawn


@dataclass(frozen=True)
class _Point:
    """A model in the plane of size and loss."""

    name: str
    size: float
    loss: float
    bounds: Mapping[str, float | None]
    colour: str
    quantised: bool


def _pareto(axes: Axes, metrics: Mapping[str, Any]) -> bool:
    points = [
        _Point(row.name, row.size_mib, row.loss, metrics[row.name]["loss_interval"], _COLOURS[row.name],
               row.name in _QUANTISED)
        for row in arm_rows(metrics) if row.size_mib is not None
    ]  # fmt: skip
    return _scatter(axes, points)


def _run_sizes(axes: Axes, runs: Sequence[tuple[str, Mapping[str, Any], str]]) -> bool:
    points = []
    for name, metrics, arm in runs:
        size = metrics["size"]["final_mib" if arm == "final" else "tuned_mib"]
        if size is not None:
            bounds = metrics[arm]["loss_interval"]
            points.append(_Point(name, size, metrics[arm]["loss"], bounds, _COLOURS[arm], arm == "final"))
    return _scatter(axes, points)


def _scatter(axes: Axes, points: Sequence[_Point]) -> bool:
    if len(points) < 2:
        return False
    for point in points:
        low, high = (point.loss if (bound := point.bounds[key]) is None else bound for key in ("low", "high"))
        axes.errorbar(
            point.size, point.loss, yerr=_lengths(point.loss, low, high),
            fmt="s" if point.quantised else "o", color=point.colour, capsize=2, ms=6,
        )  # fmt: skip
    axes.set_xlabel("MiB on disk (squares: quantised)")
    axes.set_ylabel("nats per answer token")
    axes.set_xlim(left=0)
    axes.margins(x=0.4)
    for (size, loss), names in _together(points):
        axes.annotate(", ".join(names), (size, loss), xytext=(7, 3), textcoords="offset points", fontsize=9)
    return True


def _together(points: Sequence[_Point]) -> list[tuple[tuple[float, float], list[str]]]:
    """Points with their names, those too close for two labels under one."""
    losses, sizes = [point.loss for point in points], [point.size for point in points]
    height, width = (max(losses) - min(losses)) or 1.0, max(sizes) or 1.0
    found: list[tuple[tuple[float, float], list[str]]] = []
    for point in points:
        for (size, loss), names in found:
            if abs(point.size - size) < 0.1 * width and abs(point.loss - loss) < 0.1 * height:
                names.append(point.name)
                break
        else:
            found.append(((point.size, point.loss), [point.name]))
    return found


def _differences(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(label, difference of `main_pair`): positive is better, in points, the mean first."""
    pair = "_vs_".join(main_pair(metrics))
    exact = metrics["comparisons"][pair]["accuracy"]
    tasks = [
        (name, task["comparisons"][pair])
        for name, task in metrics["tasks"].items()
        if task["share"] and task["comparisons"][pair]["value"] is not None
    ]
    mean = metrics["tasks_mean"]["comparisons"][pair]
    rows = [("held-out, exact", exact), (f"mean of {metrics['tasks_mean']['n_tasks']} tasks", mean), *tasks]
    return [(name, found) for name, found in rows if found["low"] is not None and found["high"] is not None]


def main_pair(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """The two arms that say what quantisation costs; where nothing is quantised, what the fine-tuning gained."""
    if metrics["final"]["loss"] is None:
        return "tuned", "base"
    return "final", "control" if metrics["control"]["loss"] is not None else "tuned"


def _forest_caption(metrics: Mapping[str, Any]) -> str:
    first, second = main_pair(metrics)
    return f"{first} minus {second}, percentage points, paired 95% intervals: right is better"


def _forest(axes: Axes, metrics: Mapping[str, Any]) -> bool:
    rows = [
        (name, Interval(*(100 * found[key] for key in ("value", "low", "high"))))
        for name, found in _differences(metrics)
    ]
    axes.set_xlabel("percentage points")
    return _intervals(axes, rows)


def _run_forest(axes: Axes, differences: Sequence[tuple[str, Interval]]) -> bool:
    axes.set_xlabel("nats per answer token")
    return _intervals(axes, [(name, found) for name, found in differences if math.isfinite(found.high - found.low)])


def _intervals(axes: Axes, rows: Sequence[tuple[str, Interval]]) -> bool:
    """A line for each interval, one below the other, and the line of no difference."""
    for position, (_, found) in enumerate(rows):
        lengths = _lengths(found.value, found.low, found.high)
        axes.errorbar(found.value, -position, xerr=lengths, fmt="o", color=_BLUE, capsize=3, ms=5)
    axes.axvline(0, color=_GREY, lw=1, ls="--")
    axes.set_yticks([-position for position in range(len(rows))], [name for name, _ in rows])
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    return bool(rows)


def _lengths(value: float, low: float, high: float) -> list[list[float]]:
    """What errorbar takes; a bound may lie on the value's other side by a rounding."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _sqnr(axes: Axes, metrics: Mapping[str, Any]) -> bool:
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, list[tuple[int, float]]] = {}
    for depth, name, decibels in _by_depth(metrics["layers"]):
        kinds.setdefault(name, []).append((depth, decibels))
    markers = "osD^v<>P*X"
    for number, (name, points) in enumerate(kinds.items()):
        axes.plot(*zip(*points, strict=True), marker=markers[number % len(markers)], ms=4, lw=1, label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel("output SQNR, dB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if kinds:
        axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return bool(kinds)


def _blocks_depth(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> bool:
    from matplotlib.ticker import MaxNLocator

    depths = [(int(found[-1]), row["kl"]) for row in rows if (found := re.findall(r"\.(\d+)$", row["name"]))]
    for depth, kl in sorted(depths):
        low, high = (kl["value"] if kl[key] is None else kl[key] for key in ("low", "high"))
        axes.errorbar(depth, kl["value"], yerr=_lengths(kl["value"], low, high), fmt="o", color=_BLUE, capsize=2, ms=4)
    axes.set_xlabel("block")
    axes.set_ylabel("nats a token")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return bool(depths)


def _kinds(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> bool:
    axes.set_xlabel("nats a token")
    found = [(row["name"], Interval(*(row["kl"][key] for key in ("value", "low", "high")))) for row in rows]
    return _intervals(axes, [(name, each) for name, each in found if each.low is not None and each.high is not None])


def _by_depth(layers: Mapping[str, Any]) -> Iterator[tuple[int, str, float]]:
    """(number of the block, kind of layer, dB); a layer outside the blocks stands at the depth where it was met."""
    depth = 0
    for name, health in layers.items():
        numbers = re.findall(r"\.(\d+)\.", name)
        depth = int(numbers[0]) if numbers else depth
        if health["sqnr_db"] is not None:
            yield depth, name.rsplit(".", 1)[-1], health["sqnr_db"]
