"""`quantize compare RUN RUN ...`: several runs on one page: what differs in their settings, and what that changed.

Runs are compared in pairs with the first, on the samples and tasks that both have; where they have not the same, the
row says so. What is written lies in `quantize.compare_page`, what is drawn in `quantize.compare_plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantize.document import Figure, to_html, to_markdown
from quantize.errors import UserError
from quantize.files import make_folder, refuse_run, write_atomically, writing_to
from quantize.finished import Run, cut_names, find_runs, load_run, short_names
from quantize.samples import Side, WorstSample
from quantize.statistics import (
    Interval,
    holm,
    mcnemar,
    mean_interval,
    paired_accuracy_difference,
    paired_loss_difference,
)
from quantize.task_metrics import compare_rows

_WORST = 3  # samples of each run that are shown beside the first's
_LONGEST = 600  # characters of a text


@dataclass(frozen=True)
class Paired:
    """One run against the first; `reason` says why there is nothing to pair.

    Attributes:
        p: of McNemar's test on exact answers.
        tasks: by name, as `quantize.task_metrics.compare_rows` gives them; `p_holm` over all runs' tests.
        mean: of the differences of the `n_tasks` tasks whose metric is a share of 1 in both.
        worst: the samples whose loss is most above the first run's.
    """

    loss: Interval | None = None
    accuracy: Interval | None = None
    p: float | None = None
    reason: str = ""
    tasks: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    mean: Interval | None = None
    n_tasks: int = 0
    worst: Sequence[WorstSample] = ()


def compare_runs(names: Sequence[str], root: str, output: Path) -> str:
    """Writes report.md, report.html and plots/ of the comparison into `output`.

    Args:
        names: run directories, names under `root`, or folders of runs (a sweep's).

    Returns:
        The text of report.md.

    Raises:
        UserError: fewer than two runs, one that is none or is not finished, files that cannot be read, or an `output`
            that cannot be written.
    """
    from quantize.compare_page import page
    from quantize.compare_plots import draw_comparison

    refuse_run(output)
    found = [find_runs(name, root) for name in names]
    folders = _distinct([folder for finished, _ in found for folder in finished])
    unfinished = _distinct([folder for _, others in found for folder in others])
    if len(folders) < 2:
        one = f"{' and '.join(names)} are one run, {folders[0]}; " if len(names) > 1 else ""
        raise UserError(f"{one}compare needs two runs or more, or a folder that holds them: quantize compare RUN RUN")
    make_folder(output)
    shown = short_names(folders)
    runs = [load_run(*each) for each in zip(folders, shown, cut_names(shown), strict=True)]
    paired = pair_all(runs)
    plots = draw_comparison(runs, paired)
    figures = [Figure(f"plots/{plot.name}.png", plot.caption, plot.svg) for plot in plots]
    blocks = list(page(runs, paired, figures, [folder.name for folder in unfinished]))
    text = to_markdown(blocks)
    with writing_to(output):
        (output / "plots").mkdir(exist_ok=True)
        for plot in plots:
            (output / "plots" / f"{plot.name}.png").write_bytes(plot.png)
        write_atomically(output / "report.md", text)
        write_atomically(output / "report.html", to_html(f"{len(runs)} runs", blocks))
    return text


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """Each folder once, however it was written."""
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def pair_all(runs: Sequence[Run]) -> list[Paired]:
    """Every other run against the first, the p-values of all tasks adjusted for their number together."""
    paired = [pair(runs[0], run) for run in runs[1:]]
    tests = [found for each in paired for found in each.tasks.values() if found.get("p") is not None]
    for found, adjusted in zip(tests, holm([found["p"] for found in tests]), strict=True):
        found["p_holm"] = adjusted
    return paired


def pair(first: Run, other: Run) -> Paired:
    """`other` minus `first` on the samples that both were scored on."""
    tasks = compare_rows(other.tasks, first.tasks)
    mean, count = _mean(first, other, tasks)
    order = _same_order(first, other)
    if order is None:
        kept = _samples(first) and _samples(other)
        reason = "other held-out samples, or another tokenizer" if kept else "the texts of its samples were not kept"
        return Paired(reason=reason, tasks=tasks, mean=mean, n_tasks=count)
    a, b = other.scores.taken(order), first.scores
    return Paired(
        loss=paired_loss_difference(a.nll, b.nll, a.tokens),
        accuracy=paired_accuracy_difference(a.exact, b.exact),
        p=mcnemar(a.exact, b.exact),
        tasks=tasks,
        mean=mean,
        n_tasks=count,
        worst=_worst(first, other, order),
    )


def is_share(name: str, runs: Sequence[Run]) -> bool:
    """Whether the task's metric is a share of 1 in all the runs that have it."""
    return all(run.metrics["tasks"][name]["share"] for run in runs if name in run.metrics["tasks"])


def _mean(first: Run, other: Run, tasks: Mapping[str, Mapping[str, Any]]) -> tuple[Interval | None, int]:
    """Of the tasks' differences, each of equal weight; None of fewer than two."""
    found = [
        Interval(each["value"], each["low"], each["high"])
        for name, each in tasks.items()
        if each.get("low") is not None and each.get("high") is not None and is_share(name, (first, other))
    ]
    return (mean_interval(found) if len(found) > 1 else None), len(found)


def _same_order(first: Run, other: Run) -> list[int] | None:
    """Where each sample of `first` is in `other`: a seed shuffles them. None where they are not the same samples."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for index, sample in enumerate(_samples(other)):
        places.setdefault(sample, []).append(index)
    wanted = _samples(first)
    if not wanted or len(wanted) != len(other.scores.tokens):
        return None
    found = [places[sample].pop(0) if places.get(sample) else None for sample in wanted]
    return None if None in found else [index for index in found if index is not None]


def _samples(run: Run) -> list[tuple[Any, ...]]:
    """What each held-out sample is; empty where its texts were not kept, as lengths alone do not tell samples apart."""
    texts = list(zip(run.texts.get("prompt", ()), run.texts.get("answer", ()), strict=True))
    return [(*text, int(tokens)) for text, tokens in zip(texts, run.scores.tokens, strict=True)] if texts else []


def _worst(first: Run, other: Run, order: Sequence[int]) -> list[WorstSample]:
    """The held-out samples whose loss rose most from the first run to the other, with what both said."""
    if not all(name in run.texts for run in (first, other) for name in ("prompt", "answer", "greedy_text")):
        return []
    worse = other.scores.nll[np.asarray(order)] - first.scores.nll
    chosen = [int(index) for index in np.argsort(-worse, kind="stable")[:_WORST] if worse[index] > 0]
    return [
        WorstSample(
            where="held-out",
            number=index,
            prompt=_short(first.texts["prompt"][index]),
            answer=_short(first.texts["answer"][index]),
            unit="nats",
            sides=[
                Side(run.cell, float(run.scores.nll[place]), _short(run.texts["greedy_text"][place]))
                for run, place in ((first, index), (other, order[index]))
            ],
        )
        for index in chosen
    ]


def _short(text: str) -> str:
    """The end of a long text: that of a prompt holds the question, after the few-shot examples."""
    return text if len(text) <= _LONGEST else f"[...] {text[-_LONGEST:]}"
