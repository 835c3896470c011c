"""The figures of a report: every arm in both planes, every task a row or a reason, every name readable."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from quantize.drawing import figure_names
from quantize.metrics import ARMS, build_metrics
from quantize.pareto import arm_points, draw_sizes, front, nominal_mib
from quantize.plots import draw_plots, draw_sensitivity, forest_rows, task_row
from quantize.schemes import SCHEMES
from quantize.tasks import Row

LONG = "a_task_whose_name_is_so_long_that_a_figure_of_a_phones_width_has_no_room_for_it_at_all"


@dataclass(frozen=True)
class FakeScores:
    nll: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    kl: np.ndarray | None = None
    top1: np.ndarray | None = None


def scores(shift: float, right: float, samples: int = 60) -> FakeScores:
    rng = np.random.default_rng(7)
    tokens, difficulty = rng.integers(2, 20, samples), rng.gamma(2.0, 0.5, samples)
    return FakeScores(tokens * (difficulty + shift), tokens, np.argsort(difficulty) < right * samples)


def rows(name: str, values: list[float], metric: str | None = "acc", higher: bool = True) -> list[Row]:
    common: dict[str, Any] = {"doc_hash": "h", "prompt": "p", "target": "t", "response": "r", "weight": 1.0}
    common |= {"task": name, "name": name, "metric": metric, "higher_is_better": higher}
    return [Row(doc_id=n, value=None if metric is None else value, **common) for n, value in enumerate(values)]


def build(task_rows: dict[str, list[Row]] | None = None, **changes: Any) -> dict[str, Any]:
    shifts = {"base": (1.0, 0.1), "base_quantized": (1.3, 0.1), "control": (0.1, 0.6), "ptq": (0.5, 0.3),
              "tuned": (0.15, 0.6), "final": (0.2, 0.55)}  # fmt: skip
    arguments: dict[str, Any] = {
        "arms": {arm: scores(*shift) for arm, shift in shifts.items()}, "why": {}, "train_ship_gap": 0.0,
        "backend_gap": 0.0, "reference": "control", "coverage": {"quantized_fraction": 1.0, "skipped": {}},
        "size": {"base_mib": 538.0, "tuned_mib": 538.1, "final_mib": 236.4}, "scheme": "int8-int4", "target": "cpu",
        "dtype": "float32", "simulated": False, "task_rows": task_rows,
    }  # fmt: skip
    return build_metrics(**arguments | changes)


def simulated() -> dict[str, Any]:
    sizes = {"base_mib": 538.0, "tuned_mib": 538.1}
    return build(simulated=True, scheme="fp8", target="cuda-sm89", size=sizes)


def of_arms(make: Any) -> dict[str, list[Row]]:
    return {arm: make(arm) for arm in ("control", "ptq", "final")}


def figure(metrics: dict[str, Any], name: str, **options: Any) -> Any:
    return next(plot for plot in draw_plots(metrics, {}, **options) if plot.name == name)


def test_every_arm_stands_in_both_planes_under_a_name_and_a_look_of_its_own() -> None:
    points = arm_points(build())
    assert [point.name for point in points] == list(ARMS)
    assert len({point.look[0] for point in points}) == len({point.look for point in points}) == len(ARMS)
    plot = figure(build(), "size")
    for words in (*ARMS, "nats per answer token", "exact match, %", "MiB on disk"):
        assert f">{words}<" in plot.svg, words
    assert "exact match on held-out samples (higher is better)" in plot.caption and "front" in plot.caption


def test_accuracy_is_the_tasks_mean_where_there_is_one() -> None:
    right = {"control": 30, "ptq": 20, "final": 28}
    metrics = build(of_arms(lambda arm: rows("x", [float(n < right[arm]) for n in range(40)])
                            + rows("y", [float(n < right[arm] - 4) for n in range(40)])))  # fmt: skip
    known = {point.name: point.score["value"] for point in arm_points(metrics)}
    assert known["final"] == pytest.approx((28 + 24) / 80) and known["base"] is None
    plot = figure(metrics, "size")
    assert ">mean of the tasks, %<" in plot.svg
    assert "Without a mean score of the tasks: base, base_quantized, tuned" in plot.caption


def test_the_front_is_what_no_other_beats_in_both() -> None:
    points = [(5.0, 1.0), (2.0, 3.0), (2.0, 2.0), (4.0, 2.5), (6.0, 1.0), (3.0, 2.0)]
    assert front(points) == [(2.0, 2.0), (5.0, 1.0)]
    for size, cost in set(points) - set(front(points)):
        assert any(other[0] <= size and other[1] <= cost for other in front(points))


def test_arms_without_a_file_stand_hollow_at_the_nominal_size() -> None:
    plot = figure(simulated(), "size", nominal_mib=150.0)
    assert (
        "Hollow, at the nominal size of the format, as no file is written: base_quantized, ptq, final" in plot.caption
    )
    assert all(f">{arm}<" in plot.svg for arm in ARMS)
    assert [point.nominal for point in arm_points(simulated(), 150.0)] == [False, True, False, True, False, True]


def test_arms_whose_size_is_not_known_are_named_with_the_reason() -> None:
    plot = figure(simulated(), "size")
    assert "Not drawn, as the size is not known: base_quantized, ptq, final (quantized/ is not written" in plot.caption
    assert ">final<" not in plot.svg and ">tuned<" in plot.svg


def test_a_nominal_size_counts_bits_scales_and_what_stays() -> None:
    form = {"scheme": "int8-int4", "group_size": 32}
    gathered = {
        "format": form,
        "dtype": "float32",
        "tuned": {"coverage": {"share_of_all_weights": 0.75}},
        "shipped": {},
    }
    assert nominal_mib(gathered, 100.0) == pytest.approx(25 + 75 * 4.5 / 32)
    assert nominal_mib(gathered | {"format": {"scheme": "fp8", "group_size": None}, "dtype": "bfloat16"}, 100.0) == (
        pytest.approx(25 + 75 * 8 / 16)
    )
    # In torchao's Intx tensors an integer of 4 bits takes a byte.
    assert nominal_mib(gathered | {"format": form | {"target": "cpu"}}, 100.0) == pytest.approx(25 + 75 * 8.5 / 32)
    assert nominal_mib(gathered | {"tuned": {}}, 100.0) is None and nominal_mib({}, 100.0) is None
    untied = next(name for name, scheme in SCHEMES.items() if scheme.embedding is not None)
    assert nominal_mib(gathered | {"format": {"scheme": untied, "group_size": 32}}, 100.0) is None


def test_a_task_that_is_no_share_is_a_row_in_percent_of_the_reference_and_right_is_better() -> None:
    def make(arm: str) -> list[Row]:
        worse = {"control": 0.0, "ptq": 0.5, "final": 0.2}[arm]
        noise = [0.01 * (n % 5) for n in range(40)]
        return [
            *rows("errors", [4.0 + worse + each for each in noise], "edits", higher=False),
            *rows("bleu", [30.0 - worse + each for each in noise], "bleu"),
            *rows("text", [2.0 + worse / 10 + each for each in noise], "nats per word", higher=False),
            *rows("odd", [0.0] * 40, None),
        ]

    metrics = build(of_arms(make))
    found = forest_rows(metrics)
    relative = dict(found.relative)
    assert list(relative) == ["errors", "bleu", "text"] and found.left_out == ["odd (no metric of a sample)"]
    reference = metrics["tasks"]["errors"]["control"]["value"]
    assert relative["errors"].value == pytest.approx(-100 * 0.2 / reference)
    assert relative["bleu"].value == pytest.approx(-100 * 0.2 / metrics["tasks"]["bleu"]["control"]["value"])
    assert relative["text"].value == pytest.approx(100 * (1 - math.exp(0.02)))
    assert all(row.low <= row.value <= row.high < 0 for row in relative.values())
    plot = figure(metrics, "forest")
    assert all(f">{words}<" in plot.svg for words in ("percentage points", "% of the reference", "errors", "bleu"))
    assert "right is better there, too" in plot.caption and "Not drawn: odd (no metric of a sample)" in plot.caption


def test_a_task_that_cannot_be_drawn_says_why() -> None:
    task = {"metric": "edits", "share": False, "higher_is_better": False}
    known = {"value": 1.0, "low": 0.5, "high": 2.0}
    assert task_row(task, known, 0.0) == (None, "there is no % of 0")
    assert task_row(task, {**known, "low": None}, 2.0) == (
        None,
        "too few samples, or too few that differ, for an interval",
    )
    assert task_row(task, {"value": None, "low": None, "high": None}, 2.0) == (None, "not run")


def test_names_are_cut_in_the_middle_and_stay_apart() -> None:
    names = figure_names([LONG + "1", LONG + "2", "WWWW" * 20, "short", "short", "line\nbreak\ttab"])
    assert len(set(names)) == len(names) and all(len(name) <= 36 for name in names)
    assert names[0].startswith("a_task_whose") and "…" in names[0] and names[0].endswith("1")
    assert names[3:] == ["short", "short (2)", "line break tab"]
    assert len(names[2]) < len(names[0]), "wide letters take more room"


@pytest.mark.parametrize("name", [LONG, "任务一", "задача", "🦙", "a\x00b"])
def test_no_name_of_a_task_breaks_a_figure(name: str) -> None:
    from PIL import Image

    right = {"control": 30, "ptq": 20, "final": 28}
    metrics = build(of_arms(lambda arm: rows(name, [float(n < right[arm]) for n in range(40)])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of missing glyphs, and of axes that have no room left
        plot = figure(metrics, "forest")
    image = np.asarray(Image.open(io.BytesIO(plot.png)).convert("L"))
    inked = np.flatnonzero((image < 250).any(axis=0))
    assert inked.min() > 2 and inked.max() < image.shape[1] - 2, "nothing runs over the figure's edge"
    if name == "任务一":
        assert "letters that the figure's font lacks: ??? = 任务一" in plot.caption and name in plot.svg.split(">")[0]
        assert f">{name}<" not in plot.svg


def test_groups_of_layers_with_long_names_are_drawn() -> None:
    kl = {"value": 0.1, "low": 0.05, "high": 0.2}
    groups = [{"way": "kind", "name": LONG + str(n), "kl": kl} for n in range(3)]
    groups += [{"way": "block", "name": f"model.layers.{n}", "kl": {**kl, "low": None}} for n in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots = draw_sensitivity({"groups": groups})
    assert [plot.name for plot in plots] == ["block", "kind"]


def test_one_model_is_no_plane() -> None:
    assert draw_sizes(arm_points(build())[:1], False) is None
