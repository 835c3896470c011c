"""`vllm serve` as a context: started on loopback for a measurement, waited for, and ended with all that it started."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from quantize.errors import UserError
from quantize.serving import client
from quantize.serving.environment import Vllm
from quantize.serving.gpu import SCORED_TOKENS, by_numbers, memory_share

START_SECONDS = 1800.0
"""A large model is read, compiled and captured before the first answer; a cold disk is the slowest of it."""
_END_SECONDS = 20.0
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\) ?)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)(?:: .*)?$")
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_FOLLOWS = (
    "Engine core initialization failed",
    "Engine process failed to start",
    "EngineDeadError",
    "EngineCore encountered",
)
"""What other processes say after the engine died: not why."""
_MEMORY = (
    "out of memory",
    "No available memory for the cache",
    "than desired GPU memory",
    "available KV cache memory",
    "not enough GPU memory available",
)
HINT = "shorten the context (-- --max-model-len 4096) or take a smaller format"
"""What to do, beside ending what else holds the GPU's memory, where it does not suffice."""
_SETTINGS = {
    "PYTHONUNBUFFERED": "1",
    "VLLM_NO_USAGE_STATS": "1",  # what is measured is nobody else's
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # or 16-bit models run in another runner than quantised ones, and pair with less
}
_KEY = "VLLM_API_KEY"
"""It would ask for a key that nobody gives: a measurement's server is its own client's."""


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: "http://127.0.0.1:PORT". model: the name that requests give.
        max_length: tokens of prompt and answer together.
        log: what it prints.
        hint: what to do where the GPU's memory does not suffice.
    """

    url: str
    model: str
    max_length: int
    log: Path | None = None
    hint: str = HINT


@contextmanager
def serving(
    folder: Path,
    vllm: Vllm,
    *,
    log: Path,
    arguments: Sequence[str] = (),
    model: str = "model",
    timeout: float = START_SECONDS,
    hint: str = HINT,
) -> Iterator[Server]:
    """Serves a checkpoint on a free port of 127.0.0.1 while the block runs; then all its processes are gone.

    How it samples is nothing that lies in the folder (`--generation-config vllm`), so that requests say all; which
    tokens end an answer it reads there nevertheless.

    Args:
        folder: what `quantize.serving.check.check_folder` let through.
        log: file for all that it prints; replaced.
        arguments: further ones of `vllm serve`; they win, but for the address.
        timeout: seconds until it must answer.
        hint: what to do where the GPU's memory does not suffice, beside ending what else holds it.

    Raises:
        UserError: the GPU's memory does not suffice.
        RuntimeError: it ended, or did not answer in time; with the root cause from its log.
    """
    port = _free_port()
    command = [
        str(vllm.executable), "serve", str(folder), "--served-model-name", model, "--generation-config", "vllm",
        "--max-num-batched-tokens", str(SCORED_TOKENS), *memory_share(folder), *arguments, "--host", "127.0.0.1",
        "--port", str(port),
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in vllm.environment().items() if name != _KEY}
    environment |= by_numbers() | _SETTINGS
    with _terminable():
        with log.open("w", encoding="utf-8") as stream:
            stream.write(f"{shlex.join(command)}\n")
            stream.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        guard: subprocess.Popen[bytes] | None = None
        try:
            guard = _guard(process)
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log, timeout, hint)
            found = client.describe(url, log, hint)
            yield Server(url, found["id"], int(found["max_model_len"]), log, hint)
        finally:
            _end(process)
            if guard is not None:
                guard.kill()
                guard.wait()


def _guard(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Ends the server where this process is killed outright, as a run does with what measures when it is stopped."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), str(process.pid)]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, timeout: float, hint: str) -> None:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ended(log, f"vLLM ended with exit code {process.returncode} before it answered", hint)
        if client.is_healthy(url):
            return
        time.sleep(0.1)
    raise RuntimeError(f"vLLM did not answer within {timeout:.0f} seconds; its log is {log}:\n{tail(log)}")


def ended(log: Path, what: str, hint: str = HINT) -> Exception:
    """The error to raise where the engine died: why, by its log, and what to do.

    Args:
        what: happened, in words. hint: what to do where memory does not suffice, beside ending what else holds it.
    """
    cause = root_cause(log)
    if any(words in cause for words in _MEMORY):
        return UserError(
            f"{what}: the GPU's memory does not suffice: {cause}; end what else holds it (nvidia-smi), or {hint}; "
            f"all of its log is {log}"
        )
    return RuntimeError(f"{what}: {cause}\nall of its log is {log}")


def root_cause(log: Path) -> str:
    """Why the engine died: the first exception of the last chain that is not about another process's death.

    Its own lines, where it has several (a validation error); where no exception is printed, the last lines.
    """
    chains: list[list[str]] = []
    lines = [_PREFIX.sub("", line) for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]]
    inside = chained = False
    for number, line in enumerate(lines):
        if line.startswith(_CHAINED):
            chained = True
        elif line.startswith("Traceback (most recent call last)"):
            if not chained or not chains:
                chains.append([])
            inside, chained = True, False
        elif inside and _EXCEPTION.match(line):
            chains[-1].append("\n".join([line, *_continued(lines, number)]))
            inside = False
    told = [chain[0] for chain in chains if chain and not any(words in text for words in _FOLLOWS for text in chain)]
    return told[-1] if told else "\n".join(line for line in lines[-4:] if line.strip()) or "it printed nothing"


def _continued(lines: Sequence[str], number: int) -> list[str]:
    """The indented lines that belong to the message of an exception, three at most."""
    found: list[str] = []
    for line in lines[number + 1 : number + 4]:
        if not line.startswith("  "):
            break
        found.append(line)
    return found


def tail(log: Path) -> str:
    """Its last lines."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises while the block runs, or it would end this process and leave the engine on the GPU.

    Whoever handles it already (training) is left alone.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all of its group, which the engine's workers are in; those that do not go are killed."""
    try:
        _signal_group(process, signal.SIGTERM)
        _await_end(process, _END_SECONDS)
    finally:
        _signal_group(process, signal.SIGKILL)
        _await_end(process, _END_SECONDS)  # the GPU's memory is free when they are gone
        process.wait()


def _await_end(process: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while _is_there(process) and time.monotonic() < until:
        time.sleep(0.05)


def _is_there(process: subprocess.Popen[bytes]) -> bool:
    """Whether one of the group runs; zombies, which in a container nobody may collect, do not."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    states = list(_states_of(process.pid))
    return not states or any(state not in "ZX" for state in states)


def _states_of(group: int) -> Iterator[str]:
    """The state letters of a group's processes; none where there is no /proc."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # gone meanwhile
            state, _, its_group = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group:
                yield state


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
