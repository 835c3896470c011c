"""`quantize compare RUN RUN ...`: several runs on one page: what differs in their settings, and what that changed.

Runs are compared in pairs with the first, on the samples and tasks that both have; where they have not the same, the
row says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.arms import (
    format_accuracy,
    format_difference,
    format_loss,
    format_points,
    format_size,
    format_value,
)
from quantize.document import Block, Figure, Figures, Heading, Items, Paragraph, Table, to_html, to_markdown
from quantize.errors import UserError
from quantize.files import read_mapping, write_atomically
from quantize.report import nested
from quantize.runs import find_run, renew_command
from quantize.statistics import Interval, holm, mcnemar, paired_accuracy_difference, paired_loss_difference
from quantize.task_metrics import NOTHING, compare_rows
from quantize.verdict import why

if TYPE_CHECKING:
    from quantize.evaluate import Scores
    from quantize.tasks import Row

_NO_SETTINGS = ("run.name", "run.root", "track.")


@dataclass(frozen=True)
class Run:
    """A finished run, as its directory tells it.

    Attributes:
        arm: what is compared: final, or tuned where the run quantises nothing.
        settings: by dotted name.
        prompts: (prompt, answer) of each held-out sample.
    """

    name: str
    arm: str
    metrics: Mapping[str, Any]
    settings: Mapping[str, Any]
    scores: Scores
    prompts: Sequence[tuple[str, str]]
    tasks: Sequence[Row] = ()


@dataclass(frozen=True)
class Paired:
    """One run against the first; `reason` says why there is nothing to pair."""

    loss: Interval | None = None
    accuracy: Interval | None = None
    p: float | None = None
    reason: str = ""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def compare_runs(names: Sequence[str], root: str, output: Path) -> str:
    """Writes report.md, report.html and plots/ of the comparison into `output`.

    Args:
        names: run directories, names under `root`, or folders of runs (a sweep's).

    Returns:
        The text of report.md.

    Raises:
        UserError: fewer than two runs, one that is none or is not finished, or files that cannot be read.
    """
    from quantize.plots import draw_comparison

    found = [find_runs(name, root) for name in names]
    folders = list(dict.fromkeys(folder for finished, _ in found for folder in finished))
    unfinished = list(dict.fromkeys(folder for _, others in found for folder in others))
    if len(folders) < 2:
        raise UserError("compare needs two runs or more, or a folder that holds them: quantize compare RUN RUN")
    runs = [load_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    paired = [pair(runs[0], run) for run in runs[1:]]
    plots = draw_comparison(
        [(run.name, run.metrics, run.arm) for run in runs],
        [(run.name, found.loss) for run, found in zip(runs[1:], paired, strict=True) if found.loss is not None],
        runs[0].name,
    )
    figures = [Figure(f"plots/{plot.name}.png", plot.caption, plot.svg) for plot in plots]
    blocks = list(_blocks(runs, paired, figures, unfinished))
    (output / "plots").mkdir(parents=True, exist_ok=True)
    for plot in plots:
        (output / "plots" / f"{plot.name}.png").write_bytes(plot.png)
    text = to_markdown(blocks)
    write_atomically(output / "report.md", text)
    write_atomically(output / "report.html", to_html(f"{len(runs)} runs", blocks))
    return text


def find_runs(name: str, root: str) -> tuple[list[Path], list[Path]]:
    """The run directory of that path or name, or the finished runs in that folder and its unfinished ones, by name."""
    run = find_run(name, root)
    if run is not None:
        return [run], []
    for path in (Path(name).expanduser(), Path(root).expanduser() / name):
        inside = sorted(manifest.parent for manifest in path.glob("*/manifest.json"))
        finished = [folder for folder in inside if (folder / "metrics.json").is_file()]
        if finished:
            return finished, [folder for folder in inside if folder not in finished]
        if inside:
            raise UserError(f"{path}: none of its {len(inside)} runs is finished")
    raise UserError(f"{name} is neither a run nor a folder of runs, as a path or under {root}")


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above them as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    names = []
    for path in paths:
        depth = 1
        while depth < len(path) and sum(other[-depth:] == path[-depth:] for other in paths) > 1:
            depth += 1
        names.append("/".join(path[-depth:]))
    return names


def load_run(folder: Path, name: str) -> Run:
    """Reads a finished run, which is called `name` in what is written.

    Raises:
        UserError: the run is not finished, or a file of it is damaged.
    """
    from quantize.evaluate import Scores, read_texts
    from quantize.jobs import task_rows_path
    from quantize.tasks import load_rows

    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder} is not finished; continue it with: train --resume {folder}")
    metrics, settings = (read_mapping(folder / name) for name in ("metrics.json", "config.resolved.json"))
    try:
        arm = "final" if metrics["final"]["loss"] is not None else "tuned"
        assert (
            metrics[arm]["loss"] is not None
            and "tuned_mib" in metrics["size"]
            and "why" in metrics
            and "dtype" in metrics
        )
    except (AssertionError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'metrics.json'} is damaged or of another version; renew it with: {renew_command(folder)}"
        ) from error
    path, tasks = folder / "eval" / f"{arm}.parquet", task_rows_path(folder, arm)
    rows: list[Row] = []
    try:
        scores, texts = Scores.load(path), read_texts(path)
        if metrics["tasks"]:
            path = tasks
            rows = load_rows(tasks)
    except (OSError, KeyError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        advice = "" if isinstance(error, FileNotFoundError) else "remove it, then: "
        raise UserError(f"{path} cannot be read ({said}); {advice}{renew_command(folder)}") from error
    prompts = list(zip(texts.get("prompt", ()), texts.get("answer", ()), strict=True))
    return Run(name, arm, metrics, dict(nested(settings)), scores, prompts, rows)


def pair(first: Run, other: Run) -> Paired:
    """`other` minus `first` on the samples that both were scored on."""
    tasks = compare_rows(other.tasks, first.tasks)
    order = _same_order(first, other)
    if order is None:
        return Paired(reason="other held-out samples, or another tokenizer", tasks=tasks)
    a, b = other.scores.taken(order), first.scores
    return Paired(
        loss=paired_loss_difference(a.nll, b.nll, a.tokens),
        accuracy=paired_accuracy_difference(a.exact, b.exact),
        p=mcnemar(a.exact, b.exact),
        tasks=tasks,
    )


def _same_order(first: Run, other: Run) -> list[int] | None:
    """Where each sample of `first` is in `other`: a seed shuffles them. None where they are not the same samples."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for index, sample in enumerate(_samples(other)):
        places.setdefault(sample, []).append(index)
    wanted = _samples(first)
    if len(wanted) != len(other.scores.tokens):
        return None
    found = [places[sample].pop(0) if places.get(sample) else None for sample in wanted]
    return None if None in found else [index for index in found if index is not None]


def _samples(run: Run) -> list[tuple[Any, ...]]:
    texts = run.prompts or [("", "")] * len(run.scores.tokens)
    return [(*text, int(tokens)) for text, tokens in zip(texts, run.scores.tokens, strict=True)]


def _blocks(
    runs: Sequence[Run], paired: Sequence[Paired], figures: Sequence[Figure], unfinished: Sequence[Path]
) -> Iterator[Block]:
    first = runs[0]
    yield Heading(f"ongrid: {len(runs)} runs", 1)
    yield from _findings(runs, paired)
    yield Heading("Results")
    yield Paragraph(
        f"Each run as it ships, on held-out samples; differences are from {first.name}, on the same samples, with "
        "paired 95% intervals. Loss in nats per answer token. One training seed each: what another seed would change "
        "is not in them."
    )
    header = ("run", "arm", "format", "loss", "difference [95%]", "exact", "points [95%]", "recovered", "MiB")
    rows = [_row(run, found) for run, found in zip(runs, [None, *paired], strict=True)]
    yield Table(header, rows, numeric=frozenset(range(3, 9)))
    reasons = [f"{run.name}: {found.reason}" for run, found in zip(runs[1:], paired, strict=True) if found.reason]
    if reasons:
        yield Paragraph("Not paired:")
        yield Items(reasons)
    if unfinished:
        yield Paragraph(f"Left out, as they are not finished: {', '.join(folder.name for folder in unfinished)}.")
    if figures:
        yield Figures(figures)
    yield from _tasks(runs, paired)
    yield from _settings(runs)


def _findings(runs: Sequence[Run], paired: Sequence[Paired]) -> Iterator[Block]:
    """Which runs differ from the first beyond chance, of all that were looked at."""
    known = [(run.name, found.loss) for run, found in zip(runs[1:], paired, strict=True) if found.loss is not None]
    lower = [name for name, loss in known if loss.high < 0]
    higher = [name for name, loss in known if loss.low > 0]
    unclear = [name for name, loss in known if name not in (*lower, *higher)]
    texts = [
        f"{word} than {runs[0].name}: {', '.join(names)}."
        for word, names in (("A lower loss", lower), ("A higher loss", higher))
        if names
    ]
    if unclear:
        texts.append(f"Not told apart from {runs[0].name} by these samples: {', '.join(unclear)}.")
    if len(known) > 1:
        texts.append(
            f"{len(known)} runs were compared, each at 95%: of runs that do not differ at all, one in twenty looks as "
            "if it did."
        )
    for number, text in enumerate(texts or ["No two runs were scored on the same samples."]):
        yield Paragraph(text, strong=number == 0)


def _row(run: Run, found: Paired | None) -> tuple[str, ...]:
    metrics = run.metrics
    arm = metrics[run.arm]
    loss = format_difference(found.loss.as_dict()) if found and found.loss else "-"
    points = format_points(found.accuracy.as_dict()) if found and found.accuracy else "-"
    share = metrics["recovered"]
    where = f"{metrics['scheme']}, {metrics['target']}" if metrics["scheme"] else metrics["dtype"]
    size = metrics["size"]["final_mib" if run.arm == "final" else "tuned_mib"]
    mark = " (simulated)" if arm["simulated"] else ""
    return (
        run.name, run.arm + mark, where, format_loss(arm["loss"]), loss, format_accuracy(arm["accuracy"]), points,
        "-" if share is None else f"{share:.0%}", format_size(size),
    )  # fmt: skip


def _tasks(runs: Sequence[Run], paired: Sequence[Paired]) -> Iterator[Block]:
    names = list(dict.fromkeys(name for run in runs for name in run.metrics["tasks"]))
    if not names:
        return
    yield Heading("Tasks")
    yield Paragraph(
        f"Scores as shipped; behind them the difference from {runs[0].name} on the same samples, and p adjusted for "
        "the number of tests in this table (Holm)."
    )
    tests = [found for each in paired for found in each.tasks.values() if found.get("p") is not None]
    adjusted = dict(zip(map(id, tests), holm([found["p"] for found in tests]), strict=True))
    rows = []
    for name in names:
        for run, each in zip(runs, [None, *paired], strict=True):
            task = run.metrics["tasks"].get(name)
            if task is None or task[run.arm]["value"] is None:
                reason = "not run" if task is None else why(run.metrics, f"tasks.{name}.{run.arm}.value")
                rows.append((name, run.name, reason, "-", "-"))
                continue
            share = task["share"]
            score = format_value(task[run.arm], 1 if share else 4, factor=100 if share else 1)
            found = {} if each is None else each.tasks.get(name, {})
            shown = found if found.get("value") is not None else NOTHING
            difference = found.get("reason") or (format_points(shown) if share else format_difference(shown))
            p = adjusted.get(id(found))
            rows.append((name, run.name, score, difference, "-" if p is None else f"{p:.2g}"))
    yield Table(("task", "run", "score [95%]", "difference [95%]", "p"), rows, numeric=frozenset({2, 3, 4}))


def _settings(runs: Sequence[Run]) -> Iterator[Block]:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    differing = [
        key
        for key in keys
        if not key.startswith(_NO_SETTINGS) and len({json.dumps(run.settings.get(key)) for run in runs}) > 1
    ]
    yield Heading("What differs in the settings")
    if not differing:
        yield Paragraph("Nothing but names.")
        return
    rows = [(key, *(_shown(run.settings.get(key)) for run in runs)) for key in differing]
    yield Table(("setting", *(run.name for run in runs)), rows)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
