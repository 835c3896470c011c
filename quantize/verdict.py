"""What a run shows, in words that claim no more than its intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantize.arms import format_accuracy, format_difference, format_loss, format_points

Metrics = Mapping[str, Any]

_FEW_SAMPLES = 30
_COMPARED = (("final", "ptq"), ("final", "control"), ("final", "tuned"), ("final", "base"), ("tuned", "base"))
_SUBJECTS = {
    "final": "The shipped model (final",
    "tuned": "The fine-tuned model (tuned",
    "ptq": "The quantised control (ptq",
}


def verdict(metrics: Metrics) -> list[str]:
    """What the run shows, one sentence a finding."""
    no_ptq, no_final = metrics["ptq"]["loss"] is None, metrics["final"]["loss"] is None
    control = f"the control in {metrics['dtype']} (control)"
    sentences = [
        *_finding(metrics, "final", "ptq", "the control quantised after training (ptq)"),
        *(_finding(metrics, "final", "tuned", "this run before quantisation (tuned)") if no_ptq else ()),
        *_finding(metrics, "final", "control", control),
        *_finding(metrics, "final", "base", "the untouched model (base)"),
        *(_finding(metrics, "tuned", "base", "the untouched model (base)") if no_final else ()),
        *_finding(metrics, "ptq", "control", control),
        *_tasks(metrics),
    ]
    if metrics["recovered"] is not None:
        sentences.append(_recovery(metrics))
    if not sentences:
        return ["Nothing was compared in this run."]
    few = metrics["n_samples"] < _FEW_SAMPLES
    shown = [metrics[arm]["loss_interval"]["low"] for arm in ("tuned", "final") if metrics[arm]["loss"] is not None]
    none = ", and too few for any of a loss" if None in shown else ""
    sentences.append(
        f"Intervals are about the choice of the {metrics['n_samples']} held-out samples, at one training seed"
        + (f"; with so few of them they are rough{none}." if few else ".")
    )
    return sentences


def recovered_text(metrics: Metrics) -> str:
    """`36% [20%, 50%]`, or `not shown` where the share has no bounds; a dash where nothing was to recover."""
    share, bounds = metrics["recovered"], metrics["recovered_interval"]
    if share is None:
        return "-"
    if bounds["low"] is None or bounds["high"] is None:
        return "not shown"
    return f"{_percent(share)} [{_percent(bounds['low'])}, {_percent(bounds['high'])}]"


def _percent(share: float) -> str:
    """`36%`; with one digit more where that would be 0%."""
    return f"{share:.1%}" if 0 < abs(share) < 0.005 else f"{share:.0%}"


def _recovery(metrics: Metrics) -> str:
    share, low, high = metrics["recovered"], *(metrics["recovered_interval"][key] for key in ("low", "high"))
    if low is None or high is None:
        reason = why(metrics, "recovered_interval.low")
        return f"How much is recovered of the loss that quantisation costs is not shown: {reason}."
    interval = f"95% interval {_percent(low)} to {_percent(high)}"
    if high < 0:
        return f"QAT adds to the loss that quantisation costs, by {_percent(-share)} of it ({interval} recovered)."
    if low <= 0:
        return (
            f"That any of the loss that quantisation costs is recovered is not shown: {_percent(share)} ({interval})."
        )
    return f"Of the loss that quantisation costs, {_percent(share)} is recovered ({interval})."


def is_shown(found: Mapping[str, Any]) -> bool:
    """Whether a task's difference is claimed: p adjusted for the number of tasks, and the task's own interval."""
    low, high, p = found["low"], found["high"], found["p_holm"]
    return p is not None and p < 0.05 and low is not None and high is not None and bool(low > 0 or high < 0)


def why(metrics: Metrics, key: str) -> str:
    """The recorded reason for a null, by its own key or by one above it."""
    parts = key.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((str(metrics["why"][name]) for name in names if name in metrics["why"]), "no reason recorded")


def _tasks(metrics: Metrics) -> Iterator[str]:
    """What the tasks show together, and those that differ by themselves, of all that were looked at."""
    for a, b in _COMPARED:
        pair = f"{a}_vs_{b}"
        compared = {
            name: task["comparisons"][pair]
            for name, task in metrics["tasks"].items()
            if task["comparisons"][pair]["value"] is not None
        }
        known = {arm for arm in ("control", "final") if metrics[arm]["loss"] is not None}
        if not compared or (b == "tuned" and "control" in known) or (a == "tuned" and "final" in known):
            continue
        mean = metrics["tasks_mean"]["comparisons"][pair]
        if mean["value"] is not None:
            words = _words(mean, "a lower mean score than", "a higher mean score than")
            words = words or "a mean score that these samples cannot tell from that of"
            count = metrics["tasks_mean"]["n_tasks"]
            yield f"On {count} tasks {a} has {words} {b}: {format_points(mean)} points, 95% interval in brackets."
        clear = [name for name, found in compared.items() if is_shown(found)]
        if clear:
            better = [name for name in clear if _is_better(metrics["tasks"][name], compared[name])]
            worse = [name for name in clear if name not in better]
            parts = [f"better on {', '.join(better)}"] * bool(better) + [f"worse on {', '.join(worse)}"] * bool(worse)
            found = " and ".join(parts)
            tested = f"{len(compared)} task{'s' * (len(compared) > 1)}"
            yield f"Task by task, {a} is {found} than {b} (intervals without 0, Holm-adjusted p < 0.05, {tested})."
        else:
            none = "No task" if len(compared) == 1 else f"None of the {len(compared)} tasks"
            yield f"{none} shows a difference between {a} and {b}."


def _is_better(task: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return bool((found["value"] > 0) == task["higher_is_better"])


def _finding(metrics: Metrics, first: str, second: str, name: str) -> Iterator[str]:
    """Loss and accuracy of one arm against another.

    A difference is claimed only where its interval excludes 0; of accuracies, only where McNemar's test agrees.
    """
    compared = metrics["comparisons"][f"{first}_vs_{second}"]
    if compared["loss"]["value"] is None:
        return
    subject = _SUBJECTS[first]
    subject += ", simulated)" if metrics[first]["simulated"] else ")"
    loss, accuracy = compared["loss"], compared["accuracy"]
    a, b = metrics[first], metrics[second]
    values = (
        f"{format_loss(a['loss'])} against {format_loss(b['loss'])}, {format_difference(loss)} nats per answer token"
    )
    words = (
        _words(loss, "a lower loss than", "a higher loss than") or "a loss that these samples cannot tell from that of"
    )
    yield f"{subject} has {words} {name}: {values}{', 95% interval in brackets' * (None not in loss.values())}."
    values = (
        f"{format_accuracy(a['accuracy'])} against {format_accuracy(b['accuracy'])}, {format_points(accuracy)} points"
    )
    words = _words(accuracy, "fewer exact answers than", "more exact answers than")
    p = compared["mcnemar_p"]
    tested = "" if p is None else f", McNemar p = {p:.2g}"
    if words and p is not None and p < 0.05:
        yield f"It has {words} {name}: {values}{tested}."
    else:
        yield f"No difference in exact answers is shown between {first} and {name}: {values}{tested}."


def _words(interval: Mapping[str, float | None], below: str, above: str) -> str:
    """`below` or `above` where the whole interval lies on that side of 0, else nothing."""
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return ""
    return below if high < 0 else above if low > 0 else ""
