"""What tasks show of each arm, and of each pair of arms on the same samples: the `tasks` part of metrics.json.

Pure functions of the rows that `quantize.tasks` leaves. A metric of right or wrong is compared with a score interval
and McNemar's test, any other with the paired bootstrap and a paired randomisation test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.errors import UserError
from quantize.statistics import (
    Interval,
    accuracy_interval,
    holm,
    loss_interval,
    mcnemar,
    mean_interval,
    paired_accuracy_difference,
    paired_loss_difference,
    paired_share_difference,
    share_interval,
    sign_flip,
)
from quantize.task_rows import OWN
from quantize.tasks import Row

NOTHING = {"value": None, "low": None, "high": None}
NO_TEST = {**NOTHING, "p": None, "p_holm": None}


@dataclass(frozen=True)
class Results:
    """One arm's results on one task; S samples.

    Attributes:
        values: [S] the metric, or nats summed over `weights`.
        weights: [S] 1, or words or bytes.
        higher_is_better: false of nats, whose bounds are not those of a share wherever they lie.
    """

    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    higher_is_better: bool

    @property
    def binary(self) -> bool:
        """Right or wrong, nothing between."""
        return bool(np.isin(self.values, (0.0, 1.0)).all() and (self.weights == 1).all())

    @property
    def share(self) -> bool:
        """From 0 to 1, as an accuracy is; shown in percent and percentage points."""
        within = ((self.values >= 0) & (self.values <= 1) & (self.weights == 1)).all()
        return self.higher_is_better and bool(within)

    def interval(self) -> Interval:
        """The task's score."""
        if self.binary:
            return accuracy_interval(self.values == 1)
        return (share_interval if self.share else loss_interval)(self.values, self.weights)


Rows = Mapping[str, Sequence[Row]]  # by arm; only arms that were run


def task_metrics(
    rows: Rows, arms: Sequence[str], comparisons: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The parts `tasks` and `tasks_mean` of metrics.json, and why what is null is null.

    Args:
        rows: results of each arm that was run.
        arms, comparisons: names that every task has a key for.

    Raises:
        UserError: two arms were not run on the same samples, or an arm's results hold a number that is not finite.
    """
    split = {arm: _by_name(found) for arm, found in rows.items()}
    names = list(next(iter(split.values()), {}))
    _check_same_samples(split)
    tasks: dict[str, Any] = {}
    why: dict[str, str] = {}
    for name in names:
        first = next(iter(split.values()))[name]
        results = {arm: _results(arm, name, found[name]) for arm, found in split.items()}
        if first[0].metric is None:
            why[f"tasks.{name}"] = "its metric exists of the whole task only, not of a sample: nothing to pair"
            results = {}
        tasks[name] = {
            "metric": first[0].metric,
            "higher_is_better": first[0].higher_is_better,
            "share": bool(results) and all(each.share for each in results.values()),
            "n_samples": len(first),
            **{arm: results[arm].interval().as_dict() if arm in results else dict(NOTHING) for arm in arms},
            "comparisons": {f"{a}_vs_{b}": _compare(results.get(a), results.get(b)) for a, b in comparisons},
        }
    for a, b in comparisons:
        _adjust([task["comparisons"][f"{a}_vs_{b}"] for task in tasks.values()])
    mean, reason = _mean(tasks, arms, comparisons)
    return tasks, mean, why | ({} if reason is None else {"tasks_mean": reason})


def compare_rows(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By task of two runs' rows: the paired difference of the first from the second, with p; or the reason for none."""
    ours, theirs = _by_name(rows), _by_name(others)
    found: dict[str, dict[str, Any]] = {}
    for name in ours:
        if [_identity(row) for row in ours[name]] != [_identity(row) for row in theirs.get(name, ())]:
            found[name] = {"reason": "other samples" if name in theirs else "not run there"}
        elif ours[name][0].metric is None:
            found[name] = {"reason": "no metric of a sample"}
        else:
            found[name] = _compare(*(_results("a run", name, each[name]) for each in (ours, theirs)))
    return found


def _identity(row: Row) -> tuple[Any, ...]:
    return row.task, row.doc_id, row.doc_hash, row.metric


def _by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row)
    return found


def _check_same_samples(split: Mapping[str, Mapping[str, Sequence[Row]]]) -> None:
    arms = list(split)
    for arm in arms[1:]:
        for name in dict.fromkeys([*split[arms[0]], *split[arm]]):
            ours, theirs = ([_identity(row) for row in split[each].get(name, ())] for each in (arms[0], arm))
            if ours != theirs:
                raise UserError(
                    f"{name}: {arm} and {arms[0]} were not run on the same samples ({len(theirs)} and {len(ours)}), so "
                    "no pair can be made; the task or its data changed in between: start a new run"
                )


def _results(arm: str, name: str, rows: Sequence[Row]) -> Results:
    values = np.array([math.nan if row.value is None else row.value for row in rows])
    broken = int((~np.isfinite(values)).sum())
    if rows[0].metric is not None and broken:
        raise UserError(
            f"{arm}: {name} has no number for {broken} of {len(rows)} samples: the model's numbers overflow; "
            "lower train.learning_rate or set quantize.dtype to float32"
        )
    return Results(values, np.array([row.weight for row in rows]), rows[0].higher_is_better)


def _compare(a: Results | None, b: Results | None) -> dict[str, Any]:
    if a is None or b is None:
        return dict(NO_TEST)
    if a.binary and b.binary:
        right_a, right_b = a.values == 1, b.values == 1
        difference, p = paired_accuracy_difference(right_a, right_b), mcnemar(right_a, right_b)
    else:
        both = a.share and b.share
        difference = (
            paired_share_difference(a.values, b.values)
            if both
            else paired_loss_difference(a.values, b.values, a.weights)
        )
        p = sign_flip(a.values - b.values)
    return {**difference.as_dict(), "p": p, "p_holm": None}


def _adjust(compared: Sequence[dict[str, Any]]) -> None:
    """Fills in the p-values that are adjusted for the number of tasks."""
    tested = [each for each in compared if each["p"] is not None]
    for each, adjusted in zip(tested, holm([each["p"] for each in tested]), strict=True):
        each["p_holm"] = adjusted


def _mean(
    tasks: Mapping[str, Any], arms: Sequence[str], comparisons: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], str | None]:
    """The mean over the tasks whose metric is a share of 1, each task of equal weight, as model cards give it."""
    counted = [task for name, task in tasks.items() if task["share"] and name not in OWN]

    def mean(pick: Any) -> dict[str, Any]:
        found = [pick(task) for task in counted]
        if len(found) < 2 or any(each["low"] is None or each["high"] is None for each in found):
            return dict(NOTHING)
        return mean_interval([Interval(each["value"], each["low"], each["high"]) for each in found]).as_dict()

    whole: dict[str, Any] = {
        "n_tasks": len(counted),
        **{arm: mean(lambda task, arm=arm: task[arm]) for arm in arms},
        "comparisons": {
            f"{a}_vs_{b}": mean(lambda task, pair=f"{a}_vs_{b}": task["comparisons"][pair]) for a, b in comparisons
        },
    }
    if not tasks:
        return whole, "no tasks were run: eval.tasks is empty"
    if len(counted) < 2:
        return whole, "a mean needs two tasks whose metric is a share of 1"
    return whole, "too few samples for an interval" if any(whole[arm]["value"] is None for arm in arms) else None
