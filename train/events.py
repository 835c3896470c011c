"""What happens in a run, as events; who listens, as sinks."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: run_started, stage_started, stage_finished, stage_skipped, progress (stage, done, total, text), step (arm,
            step, loss, ...), message, engine (tasks: what runs them, where it is not transformers), metrics, report,
            run_finished or run_failed (error, text).
        data: JSON-like details.
        time: seconds since the epoch.
    """

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


class Sink(Protocol):
    """Listens to a run."""

    def emit(self, event: Event) -> None:
        """Takes one event; an error ends the run, so that nothing is lost unseen."""

    def close(self) -> None:
        """Called once, at the end."""


class JsonlSink:
    """Appends events to a file, one JSON object a line; progress is left out."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8")

    def emit(self, event: Event) -> None:
        """Writes and flushes one line."""
        if event.kind != "progress":
            line = {"time": event.time, "kind": event.kind, **event.data}
            self._stream.write(json.dumps(line, default=str) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class Sinks:
    """Passes each event on to several sinks."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def emit(self, event: Event) -> None:
        """Passes the event on, in order."""
        for sink in self._sinks:
            sink.emit(event)

    def close(self) -> None:
        """Closes all, also where one of them cannot be closed."""
        with contextlib.ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)
