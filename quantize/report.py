"""report.md and report.html from metrics.json: what the run shows, in words that claim no more than its intervals.

Pure functions of `build_metrics`'s dictionary (see `quantize.metrics`) and a `ReportContext`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantize.arms import (
    ArmRow,
    arm_rows,
    format_accuracy,
    format_difference,
    format_loss,
    format_points,
    format_size,
)
from quantize.document import Block, Code, Curve, Heading, Items, Paragraph, Table, to_html, to_markdown
from quantize.metrics import ARMS, build_metrics, flatten, unexplained
from quantize.schemes import SCHEMES

__all__ = [
    "ArmRow",
    "ReportContext",
    "arm_rows",
    "build_metrics",
    "flatten",
    "format_accuracy",
    "format_difference",
    "format_loss",
    "format_points",
    "format_size",
    "render_html",
    "render_markdown",
    "unexplained",
    "verdict",
]

Metrics = Mapping[str, Any]

_FEW_SAMPLES = 30


@dataclass(frozen=True, kw_only=True)
class ReportContext:
    """What a report says beside the metrics.

    Attributes:
        run: name of the run, the title.
        command: what repeats the run.
        model, data: as the config names them.
        recipe: settings by dotted or nested name.
        versions: packages by name.
        device: the machine in words.
        seconds: duration by stage.
        losses: (step, training loss) in order; the HTML page draws them.
    """

    run: str
    command: str = ""
    model: str = ""
    data: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    losses: Sequence[tuple[float, float]] = ()


def verdict(metrics: Metrics) -> list[str]:
    """What the run shows, one sentence a finding."""
    no_ptq = metrics["ptq"]["loss"] is None
    sentences = [
        *_finding(metrics, "final", "ptq", "the control quantised after training (ptq)"),
        *(_finding(metrics, "final", "tuned", "this run before quantisation (tuned)") if no_ptq else ()),
        *_finding(metrics, "final", "base", "the untouched model (base)"),
        *_finding(metrics, "ptq", "control", "the unquantised control (control)"),
    ]
    if metrics["recovered"] is not None:
        bounds = metrics["recovered_interval"]
        known = bounds["low"] is not None
        interval = f" (95% interval {bounds['low']:.0%} to {bounds['high']:.0%})" if known else ""
        unclear = "" if known else f"; {_why(metrics, 'recovered_interval.low')}"
        sentences.append(
            f"Of the loss that quantisation costs, {metrics['recovered']:.0%} is recovered{interval}{unclear}."
        )
    if not sentences:
        return ["Nothing was compared in this run."]
    few = metrics["n_samples"] < _FEW_SAMPLES
    sentences.append(
        f"Intervals are about the choice of the {metrics['n_samples']} held-out samples, at one training seed"
        + ("; with so few of them they are rough." if few else ".")
    )
    return sentences


def render_markdown(metrics: Metrics, context: ReportContext) -> str:
    """The text of report.md."""
    return to_markdown(list(_blocks(metrics, context)))


def render_html(metrics: Metrics, context: ReportContext) -> str:
    """The text of report.html: the same content and the loss curve, in one file."""
    return to_html(context.run, list(_blocks(metrics, context)))


def _finding(metrics: Metrics, first: str, second: str, name: str) -> Iterator[str]:
    """Loss and accuracy of one arm against another; a difference is claimed only where its interval excludes 0."""
    compared = metrics["comparisons"][f"{first}_vs_{second}"]
    if compared["loss"]["value"] is None:
        return
    subject = "The shipped model (final" if first == "final" else f"The quantised control ({first}"
    subject += ", simulated)" if metrics[first]["simulated"] else ")"
    loss, accuracy = compared["loss"], compared["accuracy"]
    a, b = metrics[first], metrics[second]
    values = (
        f"{format_loss(a['loss'])} against {format_loss(b['loss'])}, {format_difference(loss)} nats per answer token"
    )
    words = (
        _words(loss, "a lower loss than", "a higher loss than") or "a loss that these samples cannot tell from that of"
    )
    yield f"{subject} has {words} {name}: {values}, 95% interval in brackets."
    values = (
        f"{format_accuracy(a['accuracy'])} against {format_accuracy(b['accuracy'])}, {format_points(accuracy)} points"
    )
    words = _words(accuracy, "fewer exact answers than", "more exact answers than")
    if words and compared["mcnemar_p"] is not None and compared["mcnemar_p"] < 0.05:
        yield f"It has {words} {name}: {values}, McNemar p = {compared['mcnemar_p']:.2g}."
    else:
        yield f"No difference in exact answers is shown against {name}: {values}."


def _words(interval: Mapping[str, float | None], below: str, above: str) -> str:
    """`below` or `above` where the whole interval lies on that side of 0, else nothing."""
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return ""
    return below if high < 0 else above if low > 0 else ""


def _blocks(metrics: Metrics, context: ReportContext) -> Iterator[Block]:
    yield Heading(f"ongrid: {context.run}", 1)
    if metrics["simulated"]:
        yield Paragraph(
            f"Simulated: this machine cannot run {metrics['scheme']} on {metrics['target']}. Quantised rows below come "
            "from the bit-true simulation of the merged model; the shipped checkpoint is not written yet.",
            strong=True,
        )
    for number, sentence in enumerate(verdict(metrics)):
        yield Paragraph(sentence, strong=number == 0)
    yield from _arms_section(metrics)
    yield from _gap_section(metrics)
    yield from _coverage_section(metrics)
    yield from _recipe_section(context)
    if metrics["simulated"] or metrics["missing"]:
        yield Heading("What is missing")
        yield Items(metrics["missing"] or ["a machine that runs the target"])
        if metrics["finish_command"]:
            yield Paragraph("This finishes the job where the target runs:")
            yield Code(metrics["finish_command"])


def _arms_section(metrics: Metrics) -> Iterator[Block]:
    yield Heading("Results")
    rows = arm_rows(metrics)
    if not rows:
        yield Paragraph("No arm was evaluated in this run.")
        yield Items([f"{name}: {_why(metrics, f'{name}.loss')}" for name in ARMS])
        return
    counts = f"{metrics['n_samples']} held-out samples, {metrics['n_tokens']} answer tokens"
    yield Paragraph(
        f"The same {counts} for every row. Loss in nats per answer token; exact match means that the greedy answer is "
        "right to the last token. In brackets: paired 95% intervals of the difference from base."
    )
    header = ("", "model", "loss", "loss vs base [95%]", "exact match", "points vs base [95%]", "MiB")
    cells = [
        (
            row.name,
            row.description,
            format_loss(row.loss),
            format_difference(row.loss_vs_base),
            format_accuracy(row.accuracy),
            format_points(row.accuracy_vs_base),
            format_size(row.size_mib),
        )
        for row in rows
    ]
    yield Table(header, cells, numeric=frozenset(range(2, 7)))
    yield Paragraph("Control has the layout of tuned, and ptq that of final, so the sizes are shared.")
    absent = [f"{name}: {_why(metrics, f'{name}.loss')}" for name in ARMS if metrics[name]["loss"] is None]
    if absent:
        yield Paragraph("Not measured:")
        yield Items(absent)


def _gap_section(metrics: Metrics) -> Iterator[Block]:
    yield Heading("Is what was trained what ships?")
    simulated = " (simulated)" if metrics["simulated"] else ""
    reference = metrics["kl"]["reference"]
    bits = metrics["size"]["bits_per_weight"]
    gap = _gap(metrics, "train_ship_gap")
    if metrics["simulated"] and metrics["train_ship_gap"] == 0:
        gap = "0, as both are the same simulation here; measured where the target runs"
    lines = [
        f"trained function minus shipped function{simulated}: {gap}",
        f"training backend's graph minus plain graph: {_gap(metrics, 'backend_gap')}",
    ]
    if metrics["kl"]["final"] is not None:
        lines.append(f"KL({reference} || final{simulated}): {metrics['kl']['final']:.4g} nats per answer token")
    else:
        lines.append(f"KL of final: not known ({_why(metrics, 'kl.final')})")
    known = f"{bits:.2f} on average" if bits is not None else f"not known ({_why(metrics, 'size.bits_per_weight')})"
    lines.append(f"bits per weight as stored: {known}")
    if metrics["size"]["memory_mib"] is not None:
        lines.append(f"weights in memory: {format_size(metrics['size']['memory_mib'])} MiB")
    lines += _speed(metrics)
    yield Items(lines)


def _speed(metrics: Metrics) -> list[str]:
    """What the format's speed on its target is known to be; of the format, not of this run."""
    scheme = SCHEMES.get(metrics["scheme"])
    target = scheme.targets.get(metrics["target"]) if scheme is not None else None
    if target is None:
        return []
    return [f"decoding with {metrics['scheme']} on {target.name}: {target.speed or 'speed not measured'}"]


def _coverage_section(metrics: Metrics) -> Iterator[Block]:
    yield Heading("Coverage")
    fraction, skipped = metrics["coverage"]["quantized_fraction"], metrics["coverage"]["skipped"]
    if fraction is None:
        yield Paragraph(f"Quantised share of the weights: not known ({_why(metrics, 'coverage.quantized_fraction')}).")
    else:
        where = f"{metrics['scheme']}, target {metrics['target']}"
        yield Paragraph(f"{_percent(fraction)} of the layers' weights are quantised ({where}).")
    if skipped:
        yield Paragraph("Kept in 16 bit:")
        yield Items([f"{name}: {reason}" for name, reason in skipped.items()])


def _recipe_section(context: ReportContext) -> Iterator[Block]:
    yield Heading("Recipe")
    if context.command:
        yield Code(context.command)
    if context.losses:
        yield Curve(context.losses)
    facts = {"model": context.model, "data": context.data, "device": context.device}
    facts = {name: text for name, text in facts.items() if text} | {
        name: str(value) for name, value in _nested(context.recipe)
    }
    if facts:
        yield Table(("setting", "value"), list(facts.items()))
    if context.seconds:
        yield Table(
            ("stage", "seconds"), [(name, f"{value:.1f}") for name, value in context.seconds.items()], frozenset({1})
        )
    if context.versions:
        yield Table(("package", "version"), list(context.versions.items()))


def _gap(metrics: Metrics, key: str) -> str:
    gap = metrics[key]
    if gap is None:
        return f"not known ({_why(metrics, key)})"
    return "0 (equal to the last bit)" if gap == 0 else f"{gap:+.3g} nats per answer token"


def _why(metrics: Metrics, key: str) -> str:
    parts = key.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((str(metrics["why"][name]) for name in names if name in metrics["why"]), "no reason recorded")


def _percent(share: float) -> str:
    """Rounded down, so that 100% means all."""
    return f"{math.floor(share * 1000) / 10:.1f}%"


def _nested(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _nested(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
