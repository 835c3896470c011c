"""The figures of `quantize compare`: those of a report, with a run for each line, point or row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from quantize.compare import Paired, is_share
from quantize.drawing import (
    COLOURS,
    MARKERS,
    ROW,
    Plot,
    bar_lengths,
    draw_figure,
    draw_intervals,
    figure_names,
    label_rows,
    legend_below,
    legend_height,
    spelled_out,
)
from quantize.finished import Run
from quantize.pareto import draw_sizes, run_point, scored_by_tasks
from quantize.plots import by_depth, draw_curves, left_out_caption, relative_caption, task_row
from quantize.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = tuple[str, Sequence[Interval | None]]  # of a task: the difference of each run but the first


def draw_comparison(runs: Sequence[Run], paired: Sequence[Paired]) -> list[Plot]:
    """The figures that these runs have the numbers for, in the report's order; `paired`: each but the first."""
    by_tasks = all(scored_by_tasks(run.metrics) for run in runs)
    points = [
        run_point(run.label, run.metrics, run.arm, run.nominal, by_tasks, number) for number, run in enumerate(runs)
    ]
    drawn = (_losses(runs), draw_sizes(points, by_tasks), _forest(runs, paired), _tasks(runs, paired), _sqnr(runs))
    return [plot for plot in drawn if plot is not None]


def _losses(runs: Sequence[Run]) -> Plot | None:
    curves = {run.name: run.losses for run in runs}
    colours = {run.name: COLOURS[number % len(COLOURS)] for number, run in enumerate(runs)}
    height, _ = legend_height(list(curves))
    missing = [run.name for run in runs if sum(math.isfinite(loss) for _, loss in run.losses) < 2]
    caption = f"Training loss by step{spelled_out(list(curves))}"
    caption += left_out_caption([f"{name} (fewer than two losses were kept)" for name in missing])
    return draw_figure("loss", caption, 2.6 + height, partial(draw_curves, losses=curves, colours=colours, below=True))


def _forest(runs: Sequence[Run], paired: Sequence[Paired]) -> Plot | None:
    """Loss against the first run's, a row a run."""
    rows, left_out = [], []
    for run, found in zip(runs[1:], paired, strict=True):
        if found.loss is None:
            left_out.append(f"{run.label} ({found.reason})")
        elif not math.isfinite(found.loss.high - found.loss.low):
            left_out.append(f"{run.label} (too few samples, or too few that differ, for an interval)")
        else:
            rows.append((run.label, found.loss))
    caption = f"Loss minus that of {runs[0].label}, nats per answer token, paired 95% intervals: left is better"
    caption += spelled_out([name for name, _ in rows]) + left_out_caption(left_out)

    def draw(figure: Figure) -> bool:
        axes = figure.add_subplot()
        axes.set_xlabel("nats per answer token")
        return draw_intervals(axes, rows)

    return draw_figure("forest", caption, 0.9 + ROW * len(rows), draw)


def _tasks(runs: Sequence[Run], paired: Sequence[Paired]) -> Plot | None:
    """Exact answers, the tasks' mean and each task against the first run's: a row a task, a mark a run."""
    points: list[Row] = [("held-out, exact", [_percent(found.accuracy) for found in paired])]
    if any(found.mean is not None for found in paired):
        counts = " or ".join(dict.fromkeys(str(found.n_tasks) for found in paired if found.mean is not None))
        points.append((f"mean of {counts} tasks", [_percent(found.mean) for found in paired]))
    relative: list[Row] = []
    left_out: list[str] = []
    for name in dict.fromkeys(name for run in runs for name in run.metrics["tasks"]):
        row = []
        for run, found in zip(runs[1:], paired, strict=True):
            interval, reason = _task(name, runs, run, found)
            row.append(interval)
            left_out += [f"{name} of {run.label} ({reason})"] if interval is None else []
        if any(row):
            (points if is_share(name, runs) else relative).append((name, row))
    panels = [
        ([row for row in rows if any(row[1])], label)
        for rows, label in ((points, "percentage points"), (relative, "% of the first run's value"))
    ]
    panels = [(rows, label) for rows, label in panels if rows]
    if not panels:
        return None
    caption = f"Difference from {runs[0].label}, percentage points, paired 95% intervals: right is better"
    caption += relative_caption(runs[0].label) if relative else ""
    caption += spelled_out([name for rows, _ in panels for name, _ in rows])
    return _draw_rows(caption + left_out_caption(left_out), panels, [run.label for run in runs[1:]])


def _task(name: str, runs: Sequence[Run], run: Run, found: Paired) -> tuple[Interval | None, str]:
    compared, task = found.tasks.get(name), runs[0].metrics["tasks"].get(name)
    if compared is None or task is None:
        return None, "not run" if compared is None else f"not run in {runs[0].name}"
    if "reason" in compared:
        return None, str(compared["reason"])
    share = {**task, "share": is_share(name, (runs[0], run))}
    return task_row(share, compared, task[runs[0].arm]["value"])


def _percent(found: Interval | None) -> Interval | None:
    if found is None or not math.isfinite(found.high - found.low):
        return None
    return Interval(100 * found.value, 100 * found.low, 100 * found.high)


def _draw_rows(caption: str, panels: Sequence[tuple[Sequence[Row], str]], names: Sequence[str]) -> Plot | None:
    row = max(ROW, 0.17 * len(names))  # inches: a mark of each run in it
    heights = [0.9 + row * len(rows) for rows, _ in panels]
    legend, columns = legend_height(names) if len(names) > 1 else (0.0, 1)

    def draw(figure: Figure) -> bool:
        grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
        for axes, (rows, label) in zip(grid[:, 0], panels, strict=True):
            _draw_row_marks(axes, rows)
            axes.set_xlabel(label)
        if len(names) > 1:
            from matplotlib.lines import Line2D

            marks = [
                Line2D([], [], color=colour, marker=marker, label=label)
                for label, (colour, marker) in zip(figure_names(names), map(_look, range(len(names))), strict=True)
            ]
            legend_below(figure, len(names), columns, marks)
        return True

    return draw_figure("tasks", caption, sum(heights) + legend, draw)


def _draw_row_marks(axes: Axes, rows: Sequence[Row]) -> None:
    for position, (_, found) in enumerate(rows):
        for number, each in enumerate(found):
            if each is not None:
                colour, marker = _look(number)
                shift = 0.7 * ((number + 0.5) / len(found) - 0.5)
                axes.errorbar(
                    each.value, -position - shift, xerr=bar_lengths(each.value, each.low, each.high), fmt=marker,
                    color=colour, capsize=2, ms=4.5,
                )  # fmt: skip
    label_rows(axes, [name for name, _ in rows])


def _look(number: int) -> tuple[str, str]:
    """Colour and marker of a run but the first, as the other figures draw it."""
    return COLOURS[(number + 1) % len(COLOURS)], MARKERS[(number + 1) % len(MARKERS)]


def _sqnr(runs: Sequence[Run]) -> Plot | None:
    """The worst layer of each block, a line a run."""
    known: dict[str, Mapping[int, float]] = {}
    for run in runs:
        worst: dict[int, float] = {}
        for depth, _, decibels in by_depth(run.metrics["layers"]):
            worst[depth] = min(decibels, worst.get(depth, math.inf))
        known[run.label] = worst
    missing = [f"{name} (no SQNR)" for name, worst in known.items() if not worst]
    height, columns = legend_height(list(known))
    caption = "SQNR of the worst quantised layer of each block, by depth: low is where it hurts"
    caption += spelled_out(list(known)) + left_out_caption(missing)

    def draw(figure: Figure) -> bool:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        for number, (label, worst) in enumerate(zip(figure_names(list(known)), known.values(), strict=True)):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            if worst:
                axes.plot(
                    *zip(*sorted(worst.items()), strict=True), marker=marker, color=colour, ms=4, lw=1, label=label
                )
        axes.set_xlabel("layer")
        axes.set_ylabel("output SQNR, dB")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(missing) < len(known):
            legend_below(figure, len(known) - len(missing), columns)
        return len(missing) < len(known)

    return draw_figure("sqnr", caption, 2.6 + height, draw)
