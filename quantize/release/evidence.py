"""A card's sections on what was measured. Every value that is missing has its reason in words, no cell is blank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
from quantize.document import Block, Code, Heading, Items, Paragraph, Table
from quantize.evidence import cost_section, tasks_section
from quantize.metrics import ARMS
from quantize.release.source import Release
from quantize.verdict import verdict, why

_REFERENCE = "reference"
_NOTHING = "n/a"
_LOCAL = re.compile(r"(?<![\w.:/])~?/(?:[^\s/:;,'\"]+/)+")
"""The folders of an absolute path."""
_LIMITS = (
    "Nothing else was evaluated: not other languages or longer texts, not factuality, safety or bias, where the limits "
    "of the base model hold and quantisation may add to them."
)
Metrics = Mapping[str, Any]


def evaluation_sections(release: Release) -> Iterator[Block]:
    """Every arm against the base, the tasks, what that shows, and whether what was trained is what ships."""
    yield Heading("Evaluation")
    if not release.is_run:
        yield from _of_conversion(release)
        return
    metrics, gathered = release.metrics, release.gathered
    yield from _arms(metrics)
    tasks = tasks_section(
        metrics, gathered["tasks"] or {}, gathered.get("task_fewshot", {}), gathered.get("task_cut", {})
    )
    found = [_filled(_below(block)) for block in tasks]
    yield from found
    if not found:
        yield Paragraph("No benchmark tasks were run: eval.tasks is empty.")
    yield Heading("What the numbers show", 3)
    yield Items(verdict(metrics))
    yield Heading("Is what was trained what ships?", 3)
    yield Items(list(_shipping(metrics)))
    yield Paragraph(_LIMITS)


def _of_conversion(release: Release) -> Iterator[Block]:
    """What `quantize eval` found, beside the model that was converted."""
    if not release.evaluation:
        yield Paragraph(
            "Not evaluated: this checkpoint was converted without a run, and no evaluation lies beside it. "
            "quantize eval measures it beside its source; the card written after that shows what it found."
        )
        return
    from quantize.folder_eval.page import page

    for block in page(release.evaluation):
        if not (isinstance(block, Heading) and block.level == 1):
            yield _filled(_without_folders(_below(block)))
    yield Paragraph(_LIMITS)


def _arms(metrics: Metrics) -> Iterator[Block]:
    counts = f"{metrics['n_samples']} held-out samples, {metrics['n_tokens']} answer tokens"
    yield Paragraph(
        f"The same {counts} for every row. Loss in nats per answer token; exact match means that the greedy answer is "
        "right to the last token. In brackets: paired 95% intervals of the difference from base."
    )
    own = {"tuned": f"fine-tuned, before quantisation, in {metrics['dtype']}", "final": "this checkpoint"}
    rows = [
        (
            row.name,
            own.get(row.name, row.description),
            format_loss(row.loss),
            _known(format_difference(row.loss_vs_base), row.name),
            format_accuracy(row.accuracy),
            _known(format_points(row.accuracy_vs_base), row.name),
            _known(format_size(row.size_mib), row.name),
        )
        for row in arm_rows(metrics)
    ]
    header = ("arm", "model", "loss", "loss vs base [95%]", "exact match", "points vs base [95%]", "MiB on disk")
    yield Table(header, rows, numeric=frozenset(range(2, 7)))
    elsewhere = metrics["elsewhere"]
    if elsewhere["arms"]:
        yield Paragraph(
            f"{' and '.join(elsewhere['arms'])} were measured on {elsewhere['device']} in {elsewhere['dtype']}, the "
            f"others where the run was finished, in {metrics['dtype']}: differences from those hold that of the "
            "arithmetic, too."
        )
    absent = [f"{name}: {why(metrics, f'{name}.loss')}" for name in ARMS if metrics[name]["loss"] is None]
    if absent:
        yield Paragraph("Not measured:")
        yield Items(absent)


def _known(text: str, arm: str) -> str:
    return text if text != "-" else _REFERENCE if arm == "base" else _NOTHING


def _shipping(metrics: Metrics) -> Iterator[str]:
    gap = metrics["train_ship_gap"]
    if gap is None:
        known = f"not known ({why(metrics, 'train_ship_gap')})"
    else:
        known = "0 (equal to the last bit)" if gap == 0 else f"{gap:+.3g} nats per answer token"
    yield f"trained function minus shipped function: {known}"
    kl = metrics["kl"]
    if kl["final"] is None:
        yield f"KL divergence from the unquantised model: not known ({why(metrics, 'kl.final')})"
    else:
        divergence = format_divergence({"value": kl["final"], **kl["final_interval"]})
        agreement = format_value({"value": kl["final_top1"], **kl["final_top1_interval"]}, 1, factor=100)
        yield (
            f"KL({kl['reference']} || final): {divergence} nats per answer token; the same most likely token at "
            f"{agreement} % of them"
        )
    sqnr = metrics["sqnr"]
    if sqnr["median_db"] is not None:
        yield (
            f"signal-to-quantisation-noise ratio of the layers' outputs: median {sqnr['median_db']:.1f} dB, lowest "
            f"{sqnr['worst_db']:.1f} dB ({sqnr['worst_layer']})"
        )


def cost_sections(release: Release) -> Iterator[Block]:
    """Size, memory and speed."""
    yield Heading("Size, memory and speed")
    lines = [f"weights on disk: {release.size_mib:,.1f} MiB"]
    if not release.is_run:
        models = release.evaluation.get("models") or {}
        memory = (models.get("model") or {}).get("memory_mib")
        known = "not measured" if memory is None else f"{memory:,.1f} MiB as it was loaded for the evaluation"
        speed = "speed: not measured for this checkpoint, as it was converted without a run"
        if release.place is not None and release.place.speed:
            speed += f"; of the format on another model: {release.place.speed}"
        yield Items([*lines, f"weights in memory: {known}", speed])
        return
    metrics = release.metrics
    size = metrics["size"]
    if size["tuned_mib"]:
        lines[0] += f", {release.size_mib / size['tuned_mib']:.2f} times the {metrics['dtype']} model's"
    for key, words in (("memory_mib", "weights in memory"), ("bits_per_weight", "bits per weight as stored")):
        unit = " MiB" if key == "memory_mib" else ", embeddings and all that is not quantised included"
        value = size[key]
        known = f"not known ({why(metrics, f'size.{key}')})" if value is None else f"{value:,.1f}{unit}"
        lines.append(f"{words}: {known}")
    yield Items(lines)
    for block in cost_section(metrics):
        if isinstance(block, Paragraph):  # whoever reads a card is on another machine
            yield Paragraph(block.text.replace("on this machine", f"on {release.device.partition(';')[0]}"))
        elif not isinstance(block, Heading):
            yield _filled(block)


def coverage_sections(release: Release) -> Iterator[Block]:
    """What share of the weights is quantised, and what is not, and why."""
    yield Heading("What is quantised")
    found = release.coverage
    if not found:
        yield Paragraph("The conversion did not record which layers it reached; config.json names the layout.")
        return
    yield Paragraph(
        f"{found['quantized_layers']} layers, {found['share_of_all_weights']:.1%} of all weights and "
        f"{found['quantized_fraction']:.1%} of the weights in linear layers that the format addresses."
        + (f" Embeddings and norms stay in {release.dtype}." if release.entry and not release.entry.embedding else "")
    )
    if found["skipped"]:
        yield Paragraph("Not quantised:")
        yield Items(_grouped(found["skipped"]))


def _grouped(skipped: Mapping[str, str]) -> list[str]:
    """`lm_head: why`; layers that differ in their numbers and share a reason in one line, all of them counted."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "N", name), reason), []).append(name)
    lines = []
    for (pattern, reason), names in groups.items():
        numbers = [match.group() for name in names if (match := re.search(r"(?<=\.)\d+(?=\.)", name))]
        many = f"{pattern} (N = {', '.join(numbers)})" if len(names) > 1 else names[0]
        lines.append(f"{many}: {reason}")
    return lines


def _without_folders(block: Block) -> Block:
    """Local files by their names alone."""
    match block:
        case Paragraph(text, strong):
            return Paragraph(_LOCAL.sub("", text), strong)
        case Code(text, language):
            return Code(_LOCAL.sub("", text), language)
        case Items(texts):
            return Items([_LOCAL.sub("", text) for text in texts])
        case Table(header, rows, numeric):
            return Table(header, [[_LOCAL.sub("", cell) for cell in row] for row in rows], numeric)
    return block


def _below(block: Block) -> Block:
    """One level under Evaluation."""
    return replace(block, level=block.level + 1) if isinstance(block, Heading) else block


def _filled(block: Block) -> Block:
    """No blank header, no blank cell."""
    if not isinstance(block, Table):
        return block
    header = [cell or ("measured" if not column else "final beside tuned") for column, cell in enumerate(block.header)]
    rows = [[cell if cell not in ("", "-") else _NOTHING for cell in row] for row in block.rows]
    return replace(block, header=header, rows=rows)
