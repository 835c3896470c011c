"""Finished runs as their directories tell them: metrics, settings, every sample's scores, and what measured them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.contract import find_faults
from quantize.errors import UserError
from quantize.files import is_neither, read_mapping
from quantize.pareto import nominal_mib
from quantize.report import nested
from quantize.runs import find_run, read_gathered, renew_command
from quantize.serving.engine import engine_words

if TYPE_CHECKING:
    from quantize.evaluate import Scores
    from quantize.tasks import Row

_LONGEST, _HEAD = 32, 15  # characters of a name in a table, and of its beginning where it is cut


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run, as its directory tells it.

    Attributes:
        short: the name where room is scarce (see `cut_names`).
        arm: what is compared: final, or tuned where the run quantises nothing.
        settings: by dotted name.
        texts: prompt, answer and greedy_text of each held-out sample, where they were kept.
        losses: (step, training loss).
        place: device, dtype and packages that measured it, by name.
        nominal: MiB of the format where no file is written; None = not known, or not needed.
    """

    name: str
    short: str
    arm: str
    metrics: Mapping[str, Any]
    settings: Mapping[str, Any]
    scores: Scores
    texts: Mapping[str, Sequence[str]]
    tasks: Sequence[Row] = ()
    losses: Sequence[tuple[float, float]] = ()
    place: Mapping[str, str] = field(default_factory=dict)
    nominal: float | None = None

    @property
    def simulated(self) -> bool:
        """Its numbers come from the simulation of a format that its machine could not run."""
        return bool(self.metrics[self.arm]["simulated"])

    @property
    def label(self) -> str:
        """Its name, where a number stands beside it that may be simulated."""
        return f"{self.name} (simulated)" if self.simulated else self.name

    @property
    def cell(self) -> str:
        """The same in a table, whose first column must leave room for the others."""
        return f"{self.short} (simulated)" if self.simulated else self.short


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
    raise is_neither(name, root, "a folder of runs")


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


def cut_names(names: Sequence[str]) -> list[str]:
    """The names, long ones cut in the middle, as those of a sweep's trials differ at their ends; no two alike."""
    found: list[str] = []
    for name in names:
        cut, number = name if len(name) <= _LONGEST else f"{name[:_HEAD]}…{name[1 + _HEAD - _LONGEST :]}", 1
        while (shown := cut if number == 1 else f"{cut} ({number})") in found:
            number += 1
        found.append(shown)
    return found


def load_run(folder: Path, name: str, short: str | None = None) -> Run:
    """Reads a finished run, which is called `name` in what is written, `short` where room is scarce.

    Raises:
        UserError: the run is not finished, or a file of it is damaged.
    """
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder} is not finished; continue it with: train --resume {folder}")
    metrics = _read(folder, "metrics.json")
    faults = find_faults(metrics)
    arm = "final" if faults or metrics["final"]["loss"] is not None else "tuned"
    if not faults and metrics[arm]["loss"] is None:
        faults = ["neither final nor tuned has a loss"]
    if not faults and metrics[arm]["accuracy"] is None:
        faults = [f"{arm}.accuracy is null, though {arm}.loss is not"]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"{folder / 'metrics.json'} is damaged or of another version ({'; '.join(faults[:3])}{more}); renew it "
            f"with: {renew_command(folder)}"
        )
    scores, texts, rows = _read_scores(folder, arm, metrics)
    settings, manifest = _read(folder, "config.resolved.json"), _read(folder, "manifest.json")
    gathered = read_gathered(folder) if (folder / "gathered.json").is_file() else {}
    try:
        losses = [(float(step), float(loss)) for step, loss in gathered.get("losses", {}).get("tuned", ())]
        nominal = nominal_mib(gathered, metrics["size"]["tuned_mib"])
        place = _place(metrics, gathered, manifest if isinstance(manifest.get("packages"), dict) else {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'gathered.json'} is damaged ({error}); renew it with: train --resume {folder}"
        ) from error
    return Run(
        name=name, short=short or name, arm=arm, metrics=metrics, settings=dict(nested(settings)), scores=scores,
        texts=texts, tasks=rows, losses=losses, place=place, nominal=nominal,
    )  # fmt: skip


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_mapping(folder / name)
    except UserError as error:
        raise UserError(f"{error}; renew it with: {renew_command(folder)}") from error


def _read_scores(folder: Path, arm: str, metrics: Mapping[str, Any]) -> tuple[Scores, dict[str, list[str]], list[Row]]:
    """Held-out scores with their texts, and results on tasks, as those of metrics.json."""
    from quantize.evaluate import Scores, read_texts
    from quantize.jobs import rows_paths
    from quantize.task_rows import OWN, load_rows

    path, rows = folder / "eval" / f"{arm}.parquet", list[Any]()
    try:
        scores, texts = Scores.load(path), read_texts(path)
        _check_scores(scores, metrics["n_samples"])
        if metrics["tasks"]:
            own = not OWN.keys().isdisjoint(metrics["tasks"])
            for path in rows_paths(folder, arm, tasks=not metrics["tasks"].keys() <= OWN.keys(), own=own):
                rows += load_rows(path)
            _check_rows(rows, metrics["tasks"], arm)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "" if isinstance(error, FileNotFoundError) else "remove it, then: "
        raise UserError(f"{path} cannot be read ({said}); {advice}{renew_command(folder)}") from error
    # What has no score for a reason that metrics.json gives has no pairs either.
    kept = {name for name, task in metrics["tasks"].items() if task["metric"] is None or task[arm]["value"] is not None}
    return scores, texts, [row for row in rows if row.name in kept]


def _check_scores(scores: Scores, samples: int | None) -> None:
    """Raises ValueError where they are not the numbers of an evaluation of so many samples."""
    if not np.isfinite(scores.nll).all():
        raise ValueError(f"the loss of {scores.broken} of its {len(scores.nll)} samples is NaN or infinite")
    if not (np.isfinite(scores.tokens).all() and (scores.tokens >= 0).all() and scores.tokens.sum() > 0):
        raise ValueError("its numbers of tokens are none")
    if scores.exact.dtype != np.bool_:
        raise ValueError("its column exact is not of true and false")
    if len(scores.nll) != samples:
        raise ValueError(f"it has {len(scores.nll)} samples, metrics.json {samples}")


def _check_rows(rows: Sequence[Row], tasks: Mapping[str, Any], arm: str) -> None:
    """Raises ValueError where they are not the rows of these tasks."""
    for name, task in tasks.items():
        own = [row for row in rows if row.name == name]
        if len(own) != task["n_samples"]:
            raise ValueError(f"it has {len(own)} samples of {name}, metrics.json {task['n_samples']}")
        broken = sum(row.value is None or not math.isfinite(row.value) for row in own)
        if broken and task[arm]["value"] is not None:
            raise ValueError(f"{name} has no number for {broken} of {len(own)} samples")


def _place(metrics: Mapping[str, Any], gathered: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """What else than weights and data decided the numbers; a run that was finished elsewhere was measured there."""
    here = gathered.get("finished") or gathered.get("trained_on") or {}
    packages = {**manifest.get("packages", {}), **here.get("packages", {})}
    known = {"device": here.get("device", manifest.get("device")), "dtype": metrics["dtype"], **packages}
    known["python"] = manifest.get("python")
    known["tasks"] = engine_words(gathered["engine"]) if gathered.get("engine") else None
    return {key: str(value) for key, value in known.items() if value is not None}
