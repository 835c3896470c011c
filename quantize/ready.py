"""A process that has imported what jobs need and forks a fresh one for each request: a start costs no import again.

What it forks has seen the libraries alone: no model, no other job, neither unsloth nor the training code. CUDA cannot
be forked once a library has looked at it, so there is none of this with a GPU: `run_jobs` starts a process of its own
then, as it does for jobs that need other imports.

The parent writes a line of JSON for each request, {request, log}; the child's progress comes back, then `@ended CODE`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

ENDED = "@ended "


class ReadyProcess:
    """Starts at the first request, and ends with `close`, or with its parent."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ReadyProcess:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it, and the process that it forked if that is still at work."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):  # what was never read cannot be flushed
                    if stream is not None:
                        stream.close()

    def lines(
        self, command: Sequence[str], environment: dict[str, str], request: Path, log: Path
    ) -> Generator[str, None, None]:
        """What the child that works on `request` prints, line by line, `@ended CODE` last.

        Args:
            command: starts this process where it does not run yet.
            environment: for it; that of the first request holds for all.
            log: takes what the child writes to stderr.
        """
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it died while it had nothing to do
        if self._process is None:
            with log.open("w", encoding="utf-8") as errors:
                self._process = subprocess.Popen(
                    [*command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
                )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        ended = False
        try:
            with suppress(BrokenPipeError):  # it is dead, and says nothing more
                process.stdin.write(json.dumps({"request": str(request), "log": str(log)}) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                ended = line.startswith(ENDED)
                yield line
                if ended:
                    return
            yield f"{ENDED}{process.wait() or 1}"
        finally:
            if not ended:
                self.close()  # whoever asked has stopped, or it has died: the next request starts another


def serve(requests: TextIO, work: Any) -> None:
    """The loop of this process: forks for each line of `requests`, until they end.

    Args:
        work: called in the child with the request's path and a stream for its progress; returns its exit code.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent says what is to end
    for line in iter(requests.readline, ""):
        asked = json.loads(line)
        parent, child = os.getpid(), os.fork()
        if child == 0:
            _become_worker(Path(asked["log"]), parent)
            code = 1
            try:
                with progress_stream() as told:
                    code = work(Path(asked["request"]), told)
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(f"{ENDED}{_wait(child, requests.fileno())}", flush=True)


def progress_stream() -> TextIO:
    """What was stdout, for lines to the parent; what others print goes to stderr, where the log is."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return told


def _become_worker(log: Path, parent: int) -> None:
    """In the child: its own log, no request to read, and an end with the process that forked it."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for source, flags, target in ((os.devnull, os.O_RDONLY, 0), (str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 2)):
        opened = os.open(source, flags, 0o644)
        os.dup2(opened, target)
        os.close(opened)


def _die_with(parent: int) -> None:
    """Asks the kernel for SIGKILL when the parent is gone, however it went."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait(child: int, requests: int) -> int:
    """The child's exit code, negative for a signal. Whoever asked may be gone before: then this process ends too."""
    ended, gone = os.pidfd_open(child), select.poll()
    gone.register(ended, select.POLLIN)
    gone.register(requests, select.POLLHUP)
    try:
        while True:
            happened = dict(gone.poll())
            if ended in happened:
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.kill(child, signal.SIGKILL)
            os._exit(1)
    finally:
        os.close(ended)
