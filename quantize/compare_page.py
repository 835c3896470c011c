"""The page of `quantize compare`, in the order of a single run's report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantize.arms import (
    format_accuracy,
    format_difference,
    format_divergence,
    format_loss,
    format_points,
    format_score,
    format_score_difference,
    format_size,
    format_value,
    task_unit,
)
from quantize.compare import Paired, is_share
from quantize.compare_findings import arithmetic, findings
from quantize.document import Block, Figure, Figures, Heading, Items, Paragraph, Table
from quantize.finished import Run
from quantize.statistics import Interval
from quantize.task_metrics import NOTHING
from quantize.verdict import recovered_text, why

_NO_SETTINGS = ("run.name", "run.root", "track.")
_LISTED = 4  # layers of one run that are listed as not quantised; metrics.json has all
_FEW_RUNS = 4  # of more, one sample each: a page for people to read
_PREFILL = "prefill_tokens_per_s"


def page(
    runs: Sequence[Run], paired: Sequence[Paired], figures: Sequence[Figure], unfinished: Sequence[str]
) -> Iterator[Block]:
    """All of it.

    Args:
        paired: each run but the first against the first.
        unfinished: names of runs that were asked for and are left out.
    """
    yield Heading(f"ongrid: {len(runs)} runs", 1)
    first, *others = findings(runs, paired)
    yield Paragraph(first, strong=True)
    yield Items(others)
    yield from _results(runs, paired, unfinished)
    yield from _tasks(runs, paired)
    if figures:
        yield Figures(figures)
    yield from _distances(runs)
    yield from _costs(runs)
    yield from _layers(runs)
    yield from _samples(runs, paired)
    yield from _coverage(runs)
    yield from _settings(runs)
    yield from _places(runs)


def _results(runs: Sequence[Run], paired: Sequence[Paired], unfinished: Sequence[str]) -> Iterator[Block]:
    yield Heading("Results")
    yield Paragraph(
        f"Each run as it ships, on held-out samples; differences are from {runs[0].label}, on the same samples, with "
        "paired 95% intervals; p is McNemar's, of exact answers. Loss in nats per answer token. Recovered: the share "
        "of the loss of quantising the run's own control that is won back. One training seed each: what another seed "
        "would change is not in them."
    )
    header = (
        "run",
        "arm",
        "format",
        "loss",
        "difference [95%]",
        "exact",
        "points [95%]",
        "p",
        "recovered [95%]",
        "MiB",
    )
    rows = [_row(run, found) for run, found in zip(runs, [None, *paired], strict=True)]
    yield Table(header, rows, numeric=frozenset(range(3, 10)))
    if cut := [f"{run.short} = {run.name}" for run in runs if run.short != run.name]:
        yield Paragraph(f"Names cut in tables: {'; '.join(cut)}.")
    reasons = [(f"not paired, {run.label}", found.reason) for run, found in zip(runs[1:], paired, strict=True)]
    reasons += [(f"interval, {run.label}", _no_bounds(found)) for run, found in zip(runs[1:], paired, strict=True)]
    reasons += [(f"recovered, {run.label}", _no_share(run)) for run in runs]
    reasons += [(f"size, {run.label}", _no_size(run)) for run in runs]
    if said := [f"{name}: {reason}" for name, reason in reasons if reason]:
        yield Paragraph("Why cells are empty:")
        yield Items(said)
    if unfinished:
        yield Paragraph(f"Left out, as they are not finished: {', '.join(unfinished)}.")


def _row(run: Run, found: Paired | None) -> tuple[str, ...]:
    metrics, arm = run.metrics, run.metrics[run.arm]
    where = f"{metrics['scheme']}, {metrics['target']}" if metrics["scheme"] else metrics["dtype"]
    return (
        run.short,
        run.arm + " (simulated)" * run.simulated,
        where,
        format_loss(arm["loss"]),
        format_difference(_dict(found.loss if found else None)),
        format_accuracy(arm["accuracy"]),
        format_points(_dict(found.accuracy if found else None)),
        "-" if found is None or found.p is None else f"{found.p:.2g}",
        recovered_text(run.metrics),
        _size(run),
    )


def _dict(found: Interval | None) -> Mapping[str, float | None]:
    return NOTHING if found is None else found.as_dict()


def _no_bounds(found: Paired) -> str:
    if found.loss is None or math.isfinite(found.loss.high - found.loss.low):
        return ""
    return "too few samples, or too few that differ"


def _no_share(run: Run) -> str:
    if run.metrics["recovered"] is None:
        return why(run.metrics, "recovered")
    return why(run.metrics, "recovered_interval.low") if recovered_text(run.metrics) == "not shown" else ""


def _size(run: Run) -> str:
    size = run.metrics["size"]["final_mib" if run.arm == "final" else "tuned_mib"]
    return f"{format_size(run.nominal)} (nominal)" if size is None and run.nominal else format_size(size)


def _no_size(run: Run) -> str:
    key = "size.final_mib" if run.arm == "final" else "size.tuned_mib"
    return why(run.metrics, key) if _size(run) == "-" else ""


def _tasks(runs: Sequence[Run], paired: Sequence[Paired]) -> Iterator[Block]:
    names = list(dict.fromkeys(name for run in runs for name in run.metrics["tasks"]))
    if not names:
        return
    yield Heading("Tasks")
    yield Paragraph(
        f"Scores as shipped; behind them the difference from {runs[0].label} on the same samples, and p adjusted for "
        "the number of tests in this table (Holm). Shares in percent and percentage points, perplexities as ratios, "
        "other metrics as they are."
    )
    rows = [
        _task_row(name, run, found, is_share(name, runs))
        for name in names
        for run, found in zip(runs, [None, *paired], strict=True)
    ]
    means = [(run, found) for run, found in zip(runs, [None, *paired], strict=True)
             if run.metrics["tasks_mean"][run.arm]["value"] is not None or (found and found.mean)]  # fmt: skip
    rows += [_mean_row(run, found) for run, found in means]
    header = ("task", "metric", "run", "score [95%]", "difference [95%]", "p")
    yield Table(header, rows, numeric=frozenset({3, 4, 5}))


def _task_row(name: str, run: Run, paired: Paired | None, share: bool) -> tuple[str, ...]:
    task = run.metrics["tasks"].get(name)
    if task is None or task[run.arm]["value"] is None:
        reason = "not run" if task is None else why(run.metrics, f"tasks.{name}.{run.arm}.value")
        return name, (task and task["metric"]) or "-", run.cell, reason, "-", "-"
    shown = {**task, "share": share}
    score, unit = format_score(shown, task[run.arm]), task_unit(task)
    if paired is None:
        return name, unit, run.cell, score, "-", "-"
    found = paired.tasks.get(name, {"reason": "no samples"})
    difference = found.get("reason") or format_score_difference(shown, found)
    if found.get("value") is not None and None in (found["low"], found["high"]):
        difference += " (too few samples, or too few that differ, for an interval)"
    p = found.get("p_holm")
    return name, unit, run.cell, score, difference, "-" if p is None else f"{p:.2g}"


def _mean_row(run: Run, paired: Paired | None) -> tuple[str, ...]:
    """The run's own mean, and the mean of the differences, which may be of fewer tasks."""
    mean = run.metrics["tasks_mean"]
    difference = "-" if paired is None else format_points(_dict(paired.mean))
    if paired is not None and paired.mean is not None and paired.n_tasks != mean["n_tasks"]:
        difference += f" (of {paired.n_tasks})"
    score = format_value(mean[run.arm], 1, factor=100)
    return "mean", f"of {mean['n_tasks']} shares", run.cell, score, difference, "-"


def _distances(runs: Sequence[Run]) -> Iterator[Block]:
    yield Heading("Is what was trained what ships?")
    yield Paragraph(
        "Loss of the trained function minus that of the shipped one, nats per answer token; then how far the shipped "
        "model's next-token distributions are from those of the run's own unquantised model: KL divergence in nats "
        "per answer token, and at how many of them the most likely token is the same. These are each run's own, not "
        "paired."
    )
    rows = []
    for run in runs:
        metrics, kl = run.metrics, run.metrics["kl"]
        gap = metrics["train_ship_gap"]
        if gap is None:
            trained = why(metrics, "train_ship_gap")
        elif gap == 0:
            trained = "0 (both are the same simulation)" if run.simulated else "0 (to the last bit)"
        else:
            trained = f"{gap:+.3g}"
        if kl["final"] is None:
            rows.append((run.cell, trained, why(metrics, "kl.final"), "-", "-"))
            continue
        divergence = format_divergence({"value": kl["final"], **kl["final_interval"]})
        agreement = format_value({"value": kl["final_top1"], **kl["final_top1_interval"]}, 1, factor=100)
        rows.append((run.cell, trained, divergence, agreement, str(kl["reference"])))
    header = ("run", "trained - shipped", "KL [95%]", "same token, % [95%]", "from")
    yield Table(header, rows, numeric=frozenset({1, 2, 3}))


def _costs(runs: Sequence[Run]) -> Iterator[Block]:
    yield Heading("What it costs to run")
    known = [run for run in runs if run.metrics["cost"]["final"] and run.metrics["cost"]["ratio"]]
    if known:
        yield Paragraph(
            "As shipped; in brackets how many times as fast (memory: as much) as the run's own unquantised model on "
            "the same machine. Of runs on different machines only the brackets can be compared."
        )
        batches = list(dict.fromkeys(batch for run in known for batch in run.metrics["cost"]["final"]["decode_ms"]))
        header = ("run", "prefill, tokens/s", *(f"decoding {batch}, ms a token" for batch in batches), "peak MiB")
        rows = [_cost_row(run, batches) for run in known]
        yield Table(header, rows, numeric=frozenset(range(1, len(header))))
    reasons = [f"{run.label}: {why(run.metrics, 'cost')}" for run in runs if run not in known]
    if reasons:
        yield Paragraph("Not measured:")
        yield Items(reasons)


def _cost_row(run: Run, batches: Sequence[str]) -> tuple[str, ...]:
    final, ratio = run.metrics["cost"]["final"], run.metrics["cost"]["ratio"]

    def cell(value: float | None, times: float | None, digits: int) -> str:
        if value is None:
            return "-"
        return f"{value:,.{digits}f}" + ("" if times is None else f" ({times:.2f})")

    decoding = [cell(final["decode_ms"].get(batch), ratio["decode_ms"].get(batch), 2) for batch in batches]
    prefill, peak = cell(final[_PREFILL], ratio[_PREFILL], 0), cell(final["peak_mib"], ratio["peak_mib"], 1)
    return run.cell, prefill, *decoding, peak


def _layers(runs: Sequence[Run]) -> Iterator[Block]:
    yield Heading("Which layer hurts")
    yield Paragraph(
        "Signal-to-quantisation-noise ratio of the quantised layers' outputs, 6 dB a bit: the median layer, and the "
        "worst."
    )
    rows = []
    for run in runs:
        found = run.metrics["sqnr"]
        if found["median_db"] is None or found["worst_db"] is None:
            rows.append((run.cell, "-", "-", why(run.metrics, "sqnr.median_db")))
            continue
        rows.append((run.cell, f"{found['median_db']:.1f}", f"{found['worst_db']:.1f}", str(found["worst_layer"])))
    yield Table(("run", "median, dB", "worst, dB", "worst layer"), rows, numeric=frozenset({1, 2}))


def _samples(runs: Sequence[Run], paired: Sequence[Paired]) -> Iterator[Block]:
    yield Heading(f"Where runs lost most against {runs[0].label}")
    if any(found.worst for found in paired):
        yield Paragraph(
            "The held-out samples whose loss rose most, with the most likely token at each place of the right answer. "
            "All samples lie in each run's eval/ARM.parquet."
        )
    each = None if len(paired) <= _FEW_RUNS else 1
    for run, found in zip(runs[1:], paired, strict=True):
        yield Heading(run.label, 3)
        if not found.worst:
            yield Paragraph(f"{found.reason or 'No sample lost, or their texts were not kept'}.")
        for sample in found.worst[:each]:
            yield Paragraph(f"{sample.where}, sample {sample.number}: {sample.prompt}")
            yield Items([f"answer: {sample.answer}"])
            sides = [(side.arm, f"{side.value:.2f}", side.text) for side in sample.sides]
            yield Table(("run", sample.unit, "said"), sides, numeric=frozenset({1}))


def _coverage(runs: Sequence[Run]) -> Iterator[Block]:
    yield Heading("Coverage")
    yield Paragraph("Share of the layers' weights that is quantised, rounded down, and what is not.")
    rows = []
    for run in runs:
        fraction, skipped = (run.metrics["coverage"][key] for key in ("quantized_fraction", "skipped"))
        known = why(run.metrics, "coverage.quantized_fraction")
        share = known if fraction is None else f"{int(fraction * 1000) / 10:.1f}%"
        listed = [f"{name}: {reason}" for name, reason in list(skipped.items())[:_LISTED]]
        listed += [f"and {len(skipped) - _LISTED} more"] if len(skipped) > _LISTED else []
        rows.append((run.cell, share, "; ".join(listed) or "-"))
    yield Table(("run", "quantised", "not quantised"), rows)


def _settings(runs: Sequence[Run]) -> Iterator[Block]:
    yield Heading("What differs in the settings")
    rows = [row for row in _differing(runs, [run.settings for run in runs]) if not row[0].startswith(_NO_SETTINGS)]
    if rows:
        yield Table(("setting", *(run.short for run in runs)), rows)
    else:
        yield Paragraph("Nothing but names.")


def _places(runs: Sequence[Run]) -> Iterator[Block]:
    yield Heading("What differs in device and versions")
    rows = _differing(runs, [run.place for run in runs])
    if rows:
        if caution := arithmetic(runs):
            yield Paragraph(caution)
        yield Table(("", *(run.short for run in runs)), rows)
    else:
        same = ", ".join(f"{key} {value}" for key, value in runs[0].place.items())
        yield Paragraph(f"Nothing: {same}.")


def _differing(runs: Sequence[Run], facts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each fact that is not the same in all runs."""
    keys = dict.fromkeys(key for each in facts for key in each)
    return [
        (key, *(_shown(each.get(key)) for each in facts))
        for key in keys
        if len({json.dumps(each.get(key), sort_keys=True) for each in facts}) > 1
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
