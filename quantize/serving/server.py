"""`vllm serve` as a context: started on loopback for a measurement, waited for, and ended with all that it started."""

from __future__ import annotations

import os
import re
import shlex
import shutil
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

START_SECONDS = 1800.0
"""A large model is read, compiled and captured before the first answer; a cold disk is the slowest of it."""
_END_SECONDS = 20.0
_SHARE = 0.9
_KEPT_GIB = 4.0
"""GPU memory that the engine leaves alone: it takes its share at the start, and the logits of scored prompts come on
top (2,048 tokens of a vocabulary of 150,000 in float32, twice)."""
_SCORED_TOKENS = 2048
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
_MEMORY = ("out of memory", "No available memory for the cache", "than desired GPU memory", "available KV cache memory")


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: "http://127.0.0.1:PORT". model: the name that requests give.
        max_length: tokens of prompt and answer together.
        log: what it prints.
    """

    url: str
    model: str
    max_length: int
    log: Path | None = None


@contextmanager
def serving(
    folder: Path,
    vllm: Vllm,
    *,
    log: Path,
    arguments: Sequence[str] = (),
    model: str = "model",
    timeout: float = START_SECONDS,
) -> Iterator[Server]:
    """Serves a checkpoint on a free port of 127.0.0.1 while the block runs; then all its processes are gone.

    It samples by nothing that lies in the folder (`--generation-config vllm`), so that requests say all.

    Args:
        folder: what `quantize.serving.check.check_folder` let through.
        log: file for all that it prints; replaced.
        arguments: further ones of `vllm serve`; they come last, and win.
        timeout: seconds until it must answer.

    Raises:
        UserError: the GPU's memory does not suffice.
        RuntimeError: it ended, or did not answer in time; with the root cause from its log.
    """
    port = _free_port()
    command = [
        str(vllm.executable), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name",
        model, "--generation-config", "vllm", "--max-num-batched-tokens", str(_SCORED_TOKENS), *_memory_share(),
        *arguments,
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    # What is measured is nobody else's: vLLM's statistics of use are not sent from here.
    environment = vllm.environment() | {"PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1"}
    with _terminable():
        with log.open("w", encoding="utf-8") as stream:
            stream.write(f"{shlex.join(command)}\n")
            stream.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        guard = _guard(process)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log, timeout)
            found = client.describe(url)
            yield Server(url, found["id"], int(found["max_model_len"]), log)
        finally:
            _end(process)
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


def _memory_share() -> list[str]:
    """The share of the GPU that is free now, as another process may hold some; nothing where nvidia-smi tells none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = [command, "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([*asked, "-i", visible or "0"], capture_output=True, text=True, timeout=20)
        free, total = (float(part) / 1024 for part in done.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []
    share = min(_SHARE, (free - _KEPT_GIB) / total)
    if share < 0.05:
        raise UserError(
            f"the GPU has {free:.1f} of {total:.1f} GiB free, too little for vLLM; end what holds the rest: nvidia-smi"
        )
    return ["--gpu-memory-utilization", f"{share:.3f}"]


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, timeout: float) -> None:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ended(log, f"vLLM ended with exit code {process.returncode} before it answered")
        if client.is_healthy(url):
            return
        time.sleep(0.1)
    raise RuntimeError(f"vLLM did not answer within {timeout:.0f} seconds; its log is {log}:\n{tail(log)}")


def ended(log: Path, what: str) -> Exception:
    """The error to raise where the engine died: why, by its log, and what to do."""
    cause = root_cause(log)
    if any(words in cause for words in _MEMORY):
        return UserError(
            f"{what}: the GPU's memory does not suffice: {cause}; end what else holds it (nvidia-smi), shorten the "
            f"context (--max-model-len 4096) or take a smaller format; all of its log is {log}"
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
