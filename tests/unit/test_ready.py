"""The process that forks others: what comes back, whose log it is, and that nothing outlives who asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quantize.ready import ReadyProcess

WORK = """
import json, os, sys, time
from pathlib import Path
from quantize.ready import serve
seen = []
def work(request, told):
    asked = json.loads(request.read_text())
    seen.append(request)
    Path(str(request) + ".pid").write_text(str(os.getpid()))
    print("@progress", asked["say"], len(seen), os.getppid() != os.getpid(), file=told, flush=True)
    print(asked.get("mutters", ""), end="", flush=True)
    print(asked["say"], "in the log", file=sys.stderr)
    if asked.get("raise"):
        raise KeyError(asked["raise"])
    time.sleep(asked.get("sleep", 0))
    return asked.get("code", 0)
serve(sys.stdin, work)
"""
COMMAND = (sys.executable, "-c", WORK)


@pytest.fixture
def ready() -> Iterator[ReadyProcess]:
    with ReadyProcess() as process:
        yield process


def asked(folder: Path, name: str, **job: object) -> tuple[Path, Path]:
    request = folder / f"{name}.json"
    request.write_text(json.dumps({"say": name, **job}))
    return request, folder / f"{name}.log"


def lines(ready: ReadyProcess, request: Path, log: Path) -> list[str]:
    return [line.strip() for line in ready.lines(COMMAND, dict(os.environ), request, log)]


def pid_of(request: Path) -> int:
    return wait_for(lambda: int(Path(f"{request}.pid").read_text()))


def wait_for(found: Callable[[], int]) -> int:
    for _ in range(200):
        try:
            return found()
        except (OSError, ValueError):
            time.sleep(0.05)
    raise AssertionError("it never came")


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_each_request_has_a_fresh_process_and_its_own_log(ready: ReadyProcess, tmp_path: Path) -> None:
    first, second = asked(tmp_path, "first"), asked(tmp_path, "second", code=2)
    assert lines(ready, *first) == ["@progress first 1 True", "@ended 0"]
    assert lines(ready, *second) == ["@progress second 1 True", "@ended 2"]
    assert pid_of(first[0]) != pid_of(second[0])
    assert first[1].read_text() == "first in the log\n" and second[1].read_text() == "second in the log\n"


def test_a_failure_or_a_kill_is_told_and_the_next_request_is_answered(ready: ReadyProcess, tmp_path: Path) -> None:
    failed = asked(tmp_path, "failed", **{"raise": "nothing"})
    assert lines(ready, *failed)[-1] == "@ended 1"
    assert "KeyError: 'nothing'" in failed[1].read_text()
    killed = asked(tmp_path, "killed", sleep=60)
    told = ready.lines(COMMAND, dict(os.environ), *killed)
    next(told)
    os.kill(pid_of(killed[0]), signal.SIGKILL)
    assert next(told).strip() == f"@ended -{signal.SIGKILL.value}"
    assert list(told) == []
    assert lines(ready, *asked(tmp_path, "next"))[-1] == "@ended 0"


def test_what_a_job_prints_is_no_answer(ready: ReadyProcess, tmp_path: Path) -> None:
    loud = asked(tmp_path, "loud", mutters="no line end, @ended 7\n@ended 9")
    assert lines(ready, *loud) == ["@progress loud 1 True", "@ended 0"]
    assert "@ended 9" in loud[1].read_text()


def test_one_that_died_with_nothing_to_do_is_started_again(ready: ReadyProcess, tmp_path: Path) -> None:
    assert lines(ready, *asked(tmp_path, "first"))[-1] == "@ended 0"
    assert ready._process is not None
    ready._process.kill()
    is_gone(ready._process.pid)
    assert lines(ready, *asked(tmp_path, "second"))[-1] == "@ended 0"


def test_whoever_stops_listening_ends_the_work(ready: ReadyProcess, tmp_path: Path) -> None:
    slow = asked(tmp_path, "slow", sleep=60)
    told = ready.lines(COMMAND, dict(os.environ), *slow)
    next(told)
    told.close()
    assert is_gone(pid_of(slow[0]))
    assert lines(ready, *asked(tmp_path, "next"))[-1] == "@ended 0"


def test_nothing_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    request, log = asked(tmp_path, "orphan", sleep=60)
    script = (
        "import os, sys; from pathlib import Path; from quantize.ready import ReadyProcess\n"
        f"asked = Path({str(request)!r}), Path({str(log)!r})\n"
        f"for line in ReadyProcess().lines({COMMAND!r}, dict(os.environ), *asked):\n    pass\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    worker = pid_of(request)
    forked_from = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    parent.kill()
    parent.wait()
    assert is_gone(worker) and is_gone(forked_from)
