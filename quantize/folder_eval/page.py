"""What `quantize eval` found as a page, and as a table for the terminal. Pure functions of eval.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from quantize.arms import (
    format_difference,
    format_divergence,
    format_points,
    format_score,
    format_score_difference,
    format_size,
    format_value,
    task_unit,
)
from quantize.document import Block, Code, Heading, Items, Paragraph, Table
from quantize.evidence import layers_section

Found = Mapping[str, Any]


def page(found: Found) -> Iterator[Block]:
    """The blocks of report.md and report.html."""
    yield Heading(f"Evaluation of {found['title']}", 1)
    first, *others = found["verdict"]
    yield Paragraph(first, strong=True)
    yield Items([*others, *found["notes"]])
    yield Heading("Held-out text")
    yield Paragraph(
        f"The same {found['n_samples']} samples of {found['data']} for every row, {found['n_tokens']:,} scored tokens. "
        "Loss in nats per token, perplexity its exponential; in brackets 95% intervals. A row's difference is "
        f"{found['models']['model']['name']} minus it, paired by sample."
    )
    yield losses_table(found)
    yield from _distances(found)
    yield Heading("Size")
    yield sizes_table(found)
    yield Paragraph(
        "On disk: the files of weights. In memory: the weights as they were loaded here, what is unquantised in the "
        "dtype beside them (float32 takes twice the memory of 16 bit)."
    )
    yield from _tasks_section(found)
    if found["layers"]:
        known = [each["sqnr_db"] for each in found["layers"].values() if each["sqnr_db"] is not None]
        median = float(np.median(known)) if known else None
        yield from layers_section({"layers": found["layers"], "sqnr": {"median_db": median}})
    yield Heading("How it was measured")
    yield Code(found["command"])
    yield Paragraph(f"{found['device']}; " + ", ".join(" ".join(each) for each in found["packages"].items()) + ".")


def losses_table(found: Found) -> Table:
    """A row for each model: loss, perplexity, what the evaluated one differs by, and exact answers where any is."""
    models, differences = found["models"], found["differences"]
    exact = any(each["exact"]["value"] for each in models.values())
    header = ["", "loss [95%]", "perplexity [95%]", "difference of loss [95%]"]
    header += ["exact, % [95%]", "difference, points [95%]"] if exact else []
    rows = []
    for key, each in models.items():
        pair = differences.get(key)
        row = [each["name"], format_value(each["loss"], 4), format_divergence(each["perplexity"], digits=4)]
        row.append("" if pair is None else format_difference(pair["loss"]))
        if exact:
            row.append(format_value(each["exact"], 1, factor=100))
            row.append("" if pair is None else format_points(pair["exact"]))
        rows.append(row)
    return Table(header, rows, frozenset(range(1, len(header))))


def sizes_table(found: Found) -> Table:
    """What each model takes on disk and in memory."""
    rows = [
        (each["name"], format_size(each["disk_mib"]), format_size(each["memory_mib"]), each["computes_in"])
        for each in found["models"].values()
    ]
    return Table(("", "MiB on disk", "MiB in memory", "computed in"), rows, frozenset({1, 2}))


def tasks_table(found: Found) -> Table | None:
    """A row for each task: every model's score, and differences from those that were run on it; None without tasks."""
    tasks, mean, models = found["tasks"], found["tasks_mean"], found["models"]
    if not tasks:
        return None
    run = [key for key in models if any(key in task for task in tasks.values())]
    pairs = [key for key in run if key != "model"]
    header = ["task", "metric", "samples", *(f"{models[key]['name']} [95%]" for key in run)]
    for key in pairs:
        header += ["difference [95%]" if len(pairs) == 1 else f"difference from {models[key]['name']} [95%]", "p"]
    rows = []
    for name, task in tasks.items():
        row = [name, task_unit(task), str(task["n_samples"]), *(format_score(task, task[key]) for key in run)]
        for key in pairs:
            pair = task["comparisons"][f"model_vs_{key}"]
            row += [format_score_difference(task, pair), "-" if pair["p_holm"] is None else f"{pair['p_holm']:.2g}"]
        rows.append(row)
    if mean["model"]["value"] is not None:
        row = ["mean", f"of {mean['n_tasks']}", "", *(format_value(mean[key], 1, factor=100) for key in run)]
        for key in pairs:
            row += [format_points(mean["comparisons"][f"model_vs_{key}"]), ""]
        rows.append(row)
    return Table(header, rows, frozenset(range(2, len(header))))


def terminal(found: Found) -> str:
    """Tables and verdict as plain text."""
    tables = [losses_table(found), sizes_table(found), tasks_table(found)]
    parts = [_aligned(table) for table in tables if table is not None]
    return "\n\n".join([*parts, "\n".join([*found["verdict"], *found["notes"]])])


def _distances(found: Found) -> Iterator[Block]:
    """How far the next-token distributions are from those of a reference that was measured along."""
    lines = []
    for key, pair in found["differences"].items():
        if pair["kl"] is not None:
            lines.append(
                f"KL({found['models'][key]['name']} || {found['models']['model']['name']}): "
                f"{format_divergence(pair['kl'])} nats per token"
            )
    if lines:
        yield Items(lines)


def _tasks_section(found: Found) -> Iterator[Block]:
    table = tasks_table(found)
    if table is None:
        return
    yield Heading("Tasks")
    yield Paragraph(
        f"The same samples for every model, run by lm-eval{_how_run(found['task_settings'])}. Shares in percent, texts "
        "by their perplexity, other metrics as they are; differences (of perplexities, ratios) are paired, p is "
        "adjusted for the number of tasks (Holm)."
    )
    yield table
    yield Items([f"{name}: {reason}" for name, reason in found["task_notes"].items()])


def _how_run(settings: Mapping[str, Any]) -> str:
    limit, examples = settings["limit"], settings["num_fewshot"]
    words = [f"the models served by {settings['engine']}"] if settings.get("engine") else []
    words += [f"at most {limit} samples of each"] if limit else []
    words += [f"{examples} examples in the prompts"] if examples is not None else []
    words += ["in the chat template"] if settings["chat_template"] else []
    return "".join(f", {each}" for each in words)


def _aligned(table: Table) -> str:
    rows: list[Sequence[str]] = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        parts = [cell.rjust(size) if column in table.numeric else cell.ljust(size) for column, (cell, size) in cells]
        return "  ".join(parts).rstrip()

    return "\n".join(map(line, rows))
