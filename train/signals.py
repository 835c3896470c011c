"""Ctrl-C and SIGTERM end a run at the next safe point, with its state saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from quantize.errors import Stopped


class StopRequest:
    """Context in which the first signal asks for a stop and a second one stops at once.

    While `graceful` is true (in training), the signal only sets `requested`; otherwise it raises `Stopped` where it
    arrives, because every stage outside training can be repeated from its start.
    """

    def __init__(self, resume_command: str) -> None:
        self.resume_command = resume_command
        self.number: int | None = None
        self.graceful = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def stopped(self) -> Stopped:
        """What ends the run."""
        return Stopped(self.number or signal.SIGINT, self.resume_command)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.requested, number
        if again or not self.graceful:
            raise self.stopped()

    def __enter__(self) -> StopRequest:
        # Handlers can only be set in the main thread; a notebook's or a sweep's thread keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
