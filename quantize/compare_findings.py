"""What a comparison of runs shows, in words that claim no more than its intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from quantize.compare import Paired
from quantize.finished import Run
from quantize.statistics import Interval
from quantize.verdict import is_shown, why

_LEVEL = 0.05


def findings(runs: Sequence[Run], paired: Sequence[Paired]) -> list[str]:
    """Which runs differ from the first beyond chance, of all that were looked at; a sentence each."""
    first, pairs = runs[0].label, list(zip(runs[1:], paired, strict=True))
    losses = [(run, found.loss, _sign(found.loss)) for run, found in pairs]
    exact = [(run, found.accuracy, _exact_sign(found)) for run, found in pairs]
    means = [(run, found.mean, _sign(found.mean)) for run, found in pairs]
    said = [
        *_told_apart(losses, f"A lower loss than {first}", f"A higher loss than {first}",
                     f"Not told apart from {first} by these samples"),
        *_told_apart(exact, f"Fewer exact answers than {first}", f"More exact answers than {first}",
                     f"No difference in exact answers from {first} is shown"),
        *_told_apart(means, f"A lower mean score on tasks than {first}", f"A higher mean score on tasks than {first}",
                     f"Mean score on tasks not told apart from that of {first}"),
        *_single_tasks(runs[0], pairs),
    ]  # fmt: skip
    if not said:
        said = ["No two runs were scored on the same samples."]
    looked_at = sum(found.loss is not None for found in paired)
    if looked_at > 1:
        said.append(
            f"{looked_at} runs were compared, each at 95%: of runs that do not differ at all, one in twenty looks as "
            "if it did."
        )
    if simulated := [run for run in runs if run.simulated]:
        said.append(
            f"Simulated, not measured as shipped: {', '.join(run.name for run in simulated)} "
            f"({'; '.join(dict.fromkeys(why(run.metrics, 'size.final_mib') for run in simulated))})."
        )
    return said + [caution for caution in [arithmetic(runs)] if caution]


def arithmetic(runs: Sequence[Run]) -> str:
    """A warning where the runs were not computed alike; empty where they were."""
    kinds = {key: list(dict.fromkeys(run.place.get(key, "unknown") for run in runs)) for key in ("dtype", "device")}
    kinds["engine of the tasks"] = list(
        dict.fromkeys(run.place.get("tasks", "transformers") for run in runs if run.tasks)
    )
    differing = [f"{key} ({'; '.join(values)})" for key, values in kinds.items() if len(values) > 1]
    if not differing:
        return ""
    return f"The runs were not measured in one {' and '.join(differing)}: differences hold that of the arithmetic, too."


def _told_apart(
    rows: Sequence[tuple[Run, Interval | None, int]], below: str, above: str, unclear: str
) -> Iterator[str]:
    """One sentence for the runs below the first, one for those above it, and one for those that may be either."""
    for sign, words in ((-1, below), (1, above), (0, unclear)):
        if names := [run.label for run, found, own in rows if found is not None and own == sign]:
            yield f"{words}: {', '.join(names)}."


def _sign(found: Interval | None) -> int:
    """-1 or 1 where the whole interval lies on that side of 0, else 0."""
    if found is None or not found.excludes_zero or not (math.isfinite(found.low) and math.isfinite(found.high)):
        return 0
    return 1 if found.low > 0 else -1


def _exact_sign(found: Paired) -> int:
    return _sign(found.accuracy) if found.p is not None and found.p < _LEVEL else 0


def _single_tasks(first: Run, pairs: Sequence[tuple[Run, Paired]]) -> Iterator[str]:
    tested = {run.label: [name for name, each in found.tasks.items() if each.get("p_holm") is not None]
              for run, found in pairs}  # fmt: skip
    count = sum(map(len, tested.values()))
    unclear = []
    for run, found in pairs:
        signs = {name: _task_sign(first, found, name) for name in tested[run.label]}
        better, worse = ([name for name, sign in signs.items() if sign == wanted] for wanted in (1, -1))
        parts = [f"better on {', '.join(better)}"] * bool(better) + [f"worse on {', '.join(worse)}"] * bool(worse)
        if parts:
            how = f"intervals without 0, Holm-adjusted p < {_LEVEL}, {count} test{'s' * (count > 1)}"
            yield f"Task by task, {run.label} is {' and '.join(parts)} than {first.label} ({how})."
        elif signs:
            unclear.append(run.label)
    if unclear:
        yield f"No single task shows a difference from {first.label}: {', '.join(unclear)}."


def _task_sign(first: Run, found: Paired, name: str) -> int:
    """1 = shown to be better, -1 = shown to be worse, 0 = neither."""
    each = found.tasks[name]
    if not is_shown(each):
        return 0
    return 1 if (each["value"] > 0) == first.metrics["tasks"][name]["higher_is_better"] else -1
