"""report.md and report.html from metrics.json: what the run shows, in words that claim no more than its intervals.

Pure functions of `build_metrics`'s dictionary (see `quantize.metrics`) and a `ReportContext`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantize.arms import (
    arm_rows,
    format_accuracy,
    format_difference,
    format_divergence,
    format_loss,
    format_points,
    format_size,
    format_value,
)
from quantize.document import Block, Code, Figure, Figures, Heading, Items, Paragraph, Table, to_html, to_markdown
from quantize.evidence import cost_section, layers_section, samples_section, tasks_section
from quantize.metrics import ARMS
from quantize.plots import Plot
from quantize.samples import WorstSample
from quantize.schemes import SCHEMES
from quantize.verdict import verdict, why

__all__ = ["ReportContext", "arm_rows", "nested", "render_html", "render_markdown", "verdict"]

Metrics = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportContext:
    """What a report says beside the metrics.

    Attributes:
        run: name of the run, the title.
        command: what repeats the run.
        model, data: as the config names them.
        recipe: settings by dotted or nested name; what is None or empty is not shown.
        task_settings: those of `quantize.tasks.Settings`.
        few_shot: examples in the prompts, by task.
        cut: how many prompts were longer than the model's context, by task.
        versions: packages by name.
        device: the machine in words.
        seconds: duration by stage.
        losses: (step, training loss) in order, by arm.
        choice: what chose the numbers that ship, where training did not.
        worst: the samples that quantisation hurt most.
        plots: figures (see `quantize.plots`).
    """

    run: str
    command: str = ""
    model: str = ""
    data: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    few_shot: Mapping[str, int | str] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    choice: Sequence[str] = ()
    worst: Sequence[WorstSample] = ()
    plots: Sequence[Plot] = ()


def render_markdown(metrics: Metrics, context: ReportContext) -> str:
    """The text of report.md."""
    return to_markdown(list(_blocks(metrics, context)))


def render_html(metrics: Metrics, context: ReportContext) -> str:
    """The text of report.html: the same content with its figures, in one file."""
    return to_html(context.run, list(_blocks(metrics, context)))


def _blocks(metrics: Metrics, context: ReportContext) -> Iterator[Block]:
    yield Heading(f"ongrid: {context.run}", 1)
    if metrics["simulated"]:
        yield Paragraph(
            f"Simulated: this machine cannot run {metrics['scheme']} on {metrics['target']}. Quantised rows below come "
            "from the bit-true simulation of the merged model; the shipped checkpoint is not written yet.",
            strong=True,
        )
    first, *others = verdict(metrics)
    yield Paragraph(first, strong=True)
    yield Items(others)
    yield from _arms_section(metrics)
    yield from tasks_section(metrics, context.task_settings, context.few_shot, context.cut)
    if context.plots:
        yield Figures([Figure(f"plots/{plot.name}.png", plot.caption, plot.svg) for plot in context.plots])
    yield from _gap_section(metrics)
    yield from cost_section(metrics)
    yield from layers_section(metrics)
    yield from samples_section(context.worst)
    yield from _coverage_section(metrics, context.choice)
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
        yield Items([f"{name}: {why(metrics, f'{name}.loss')}" for name in ARMS])
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
    if metrics["control"]["loss"] is not None:
        yield Paragraph("Control has the layout of tuned, and ptq that of final, so the sizes are shared.")
    elsewhere = metrics["elsewhere"]
    if elsewhere["arms"]:
        yield Paragraph(
            f"{' and '.join(elsewhere['arms'])} were measured where the run was trained ({elsewhere['device']}, in "
            f"{elsewhere['dtype']}, {', '.join(map(' '.join, elsewhere['packages'].items()))}; what is quantised "
            f"simulated), the others where it was finished (in {metrics['dtype']}): differences from those two hold "
            "that of the arithmetic, too."
        )
    absent = [f"{name}: {why(metrics, f'{name}.loss')}" for name in ARMS if metrics[name]["loss"] is None]
    if absent:
        yield Paragraph("Not measured:")
        yield Items(absent)


def _gap_section(metrics: Metrics) -> Iterator[Block]:
    yield Heading("Is what was trained what ships?")
    simulated = " (simulated)" if metrics["simulated"] else ""
    bits = metrics["size"]["bits_per_weight"]
    gap = _gap(metrics, "train_ship_gap")
    if metrics["simulated"] and metrics["train_ship_gap"] == 0:
        gap = "0, as both are the same simulation here; measured where the target runs"
    lines = [
        f"trained function minus shipped function{simulated}: {gap}",
        f"training backend's graph minus plain graph: {_gap(metrics, 'backend_gap')}",
    ]
    lines += [_distance(metrics, arm) for arm in ("final", "ptq")]
    known = f"{bits:.2f} on average" if bits is not None else f"not known ({why(metrics, 'size.bits_per_weight')})"
    lines.append(f"bits per weight as stored, embeddings and all that is not quantised included: {known}")
    if metrics["size"]["memory_mib"] is not None:
        lines.append(f"weights in memory: {format_size(metrics['size']['memory_mib'])} MiB")
    lines += _speed(metrics)
    yield Items(lines)


def _distance(metrics: Metrics, arm: str) -> str:
    """How far the arm's next-token distributions are from those of the unquantised model."""
    kl, mark = metrics["kl"], " (simulated)" if metrics["kl"]["simulated"] else ""
    if kl[arm] is None:
        return f"KL divergence of {arm} from the unquantised model: not known ({why(metrics, f'kl.{arm}')})"
    bounds, top1 = kl[f"{arm}_interval"], kl[f"{arm}_top1_interval"]
    divergence = format_divergence({"value": kl[arm], **bounds})
    agreement = format_value({"value": kl[f"{arm}_top1"], **top1}, 1, factor=100)
    return (
        f"KL({kl['reference']} || {arm}{mark}): {divergence} nats per answer token; "
        f"the same most likely token at {agreement} % of them"
    )


def _speed(metrics: Metrics) -> list[str]:
    """What the format's speed on its target is known to be; of the format, not of this run."""
    scheme = SCHEMES.get(metrics["scheme"])
    target = scheme.targets.get(metrics["target"]) if scheme is not None else None
    if target is None:
        return []
    return [f"decoding with {metrics['scheme']} on {target.name}: {target.speed or 'speed not measured'}"]


def _coverage_section(metrics: Metrics, choice: Sequence[str]) -> Iterator[Block]:
    yield Heading("Coverage")
    fraction, skipped = metrics["coverage"]["quantized_fraction"], metrics["coverage"]["skipped"]
    if fraction is None:
        yield Paragraph(f"Quantised share of the weights: not known ({why(metrics, 'coverage.quantized_fraction')}).")
    else:
        where = f"{metrics['scheme']}, target {metrics['target']}"
        of_all = metrics["coverage"]["share_of_all_weights"]
        more = "" if of_all is None else f", {_percent(of_all)} of all the model's weights"
        yield Paragraph(f"{_percent(fraction)} of the layers' weights{more} are quantised ({where}).")
    if choice:
        yield Items(choice)
    if skipped:
        yield Paragraph("Not quantised:")
        yield Items([f"{name}: {reason}" for name, reason in skipped.items()])


def _recipe_section(context: ReportContext) -> Iterator[Block]:
    yield Heading("Recipe")
    if context.command:
        yield Code(context.command)
    for arm, points in context.losses.items():
        finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
        if finite:
            said = ", ".join(f"{loss:.4f} at step {step:g}" for step, loss in (finite[0], finite[-1]))
            yield Paragraph(f"Training loss ({arm}): {said}.")
    facts = {"model": context.model, "data": context.data, "device": context.device}
    facts = {name: text for name, text in facts.items() if text} | {
        name: str(value) for name, value in nested(context.recipe) if value not in (None, [], {})
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
        return f"not known ({why(metrics, key)})"
    return "0 (equal to the last bit)" if gap == 0 else f"{gap:+.3g} nats per answer token"


def _percent(share: float) -> str:
    """Rounded down, so that 100% means all."""
    return f"{math.floor(share * 1000) / 10:.1f}%"


def nested(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from nested(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
