"""What every step of the line is made of: run once under a fingerprint of its inputs, often in a fresh process."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.layers import select_layers
from quantize.schemes import Scheme, Target
from quantize.worker import run_jobs
from train.events import Event, Sinks

if TYPE_CHECKING:
    from torch import nn

    from quantize.layers import Coverage
    from quantize.ready import ReadyProcess
    from train.rundir import RunDir


@dataclass(frozen=True)
class Format:
    """The format of this run: what ships, where, and what this machine lacks to run it."""

    scheme: Scheme
    target: Target
    group_size: int | None
    skip: tuple[str, ...]
    missing: tuple[str, ...]
    choice: Mapping[str, Any] = field(default_factory=dict)
    """What chooses the numbers (`quantize.calibrate.Recipe.of_job`); empty = training did, or round-to-nearest."""

    @property
    def simulated(self) -> bool:
        """This machine cannot run the target."""
        return bool(self.missing)

    def job(self) -> dict[str, Any]:
        """The worker's form."""
        return {
            "scheme": self.scheme.name,
            "target": self.target.name,
            "group_size": self.group_size,
            "skip": list(self.skip),
            **self.choice,
        }

    def select(self, model: nn.Module) -> Coverage:
        """What it reaches of a model."""
        return select_layers(model, self.scheme, self.group_size, self.target, self.skip)


@dataclass(frozen=True)
class Tuned:
    """A finished fine-tuning: its 16-bit checkpoint and what was measured in the training graph."""

    merged: Path
    result: dict[str, Any]


class StageLog:
    """Runs the steps of one run directory, says so to its sinks, and skips those that are done."""

    def __init__(self, directory: RunDir, events: Sinks, ready: ReadyProcess | None = None) -> None:
        self.directory, self.events, self.ready = directory, events, ready

    def run(
        self, name: str, key: str, work: Callable[[], dict[str, Any]], makes: Sequence[Path] = ()
    ) -> dict[str, Any]:
        """The result of a step: that of an earlier attempt with the same key, else of `work`.

        Args:
            makes: what the step leaves on disk; where some of it is gone, the step is done anew. So it is where its
                result says that it `failed`.
        """
        done = self.directory.stage_done(name, key)
        if done is not None and not done.get("failed") and all(path.exists() for path in makes):
            self.events.emit(Event("stage_skipped", {"stage": name}))
            return done
        self.events.emit(Event("stage_started", {"stage": name}))
        self.directory.stage_start(name, key)
        started = time.monotonic()
        result = work()
        seconds = time.monotonic() - started
        self.directory.stage_finish(name, key, seconds, result)
        self.events.emit(Event("stage_finished", {"stage": name, "seconds": seconds}))
        return result

    def jobs(self, name: str, jobs: list[dict[str, Any]]) -> list[Any]:
        """The results of jobs that a fresh process does (see `quantize.worker`)."""

        counted = "tasks" if name.startswith("tasks-") else "samples"

        def progress(job: str, done: int, total: int) -> None:
            self.events.emit(Event("progress", {"stage": job, "done": done, "total": total, "text": counted}))

        return run_jobs(jobs, self.directory.path / "eval" / f"{name}.request.json", progress, ready=self.ready)


def file_fingerprint(path: Path) -> str:
    """Fingerprint of a file's contents (16 hex digits)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def fingerprint_of(*parts: Any) -> str:
    """Fingerprint of a step's inputs (16 hex digits)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
