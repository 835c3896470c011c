"""A fresh process for everything that must happen in the plain graph.

The training process has unsloth's class-level patches at work, so evaluation of what ships and the conversion itself
run here, where neither unsloth nor the training code is imported. `run_jobs` (parent) writes a request, has it done by
`python -m quantize.worker REQUEST` or by a fork of a process that is ready for it (`quantize.ready`), forwards its
progress and returns its results.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn, TextIO

from quantize import surroundings
from quantize.errors import UserError
from quantize.imports import uncollected
from quantize.ready import ENDED, ReadyProcess, progress_stream, serve

Progress = Callable[[str, int, int], None]
_READY = "--ready"
_UNUSED = ("sklearn", "scipy")
_COMMAND = (sys.executable, "-m", "quantize.worker")


def run_jobs(
    jobs: Sequence[Mapping[str, Any]],
    request: Path,
    progress: Progress | None = None,
    *,
    packages: Path | None = None,
    ready: ReadyProcess | None = None,
) -> list[Any]:
    """Runs jobs in a fresh process, in order, and returns one result a job.

    Args:
        jobs: each a mapping with `kind` (see `quantize.worker_jobs`) and that function's arguments.
        request: where the request is written; the answer lies beside it.
        progress: called with (job's name, done, total).
        packages: a folder of packages that this process alone sees (`quantize.export.environment`).
        ready: forks the fresh process, where it can; whoever has more requests keeps one for all of them.

    Raises:
        UserError: what the worker found wrong with the input.
        RuntimeError: the worker failed; the message ends with its last lines, all of them lie beside the request.
    """
    answer, log = request.with_suffix(".answer.json"), request.with_suffix(".log")
    request.parent.mkdir(parents=True, exist_ok=True)
    request.write_text(json.dumps(list(jobs), indent=1), encoding="utf-8")
    answer.unlink(missing_ok=True)
    environment = {**surroundings.variables(), "PYTHONUNBUFFERED": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    project = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [project, str(packages or ""), environment.get("PYTHONPATH")])
    )
    log.write_text("", encoding="utf-8")
    if ready is not None and packages is None and _can_be_forked(jobs):
        lines = ready.lines([*_COMMAND, _READY], environment, request, log)
    else:
        lines = _fresh_lines([*_COMMAND, str(request)], environment, log)
    code = 1
    with closing(lines):  # whatever happens here ends the process
        for line in lines:
            if progress is not None and line.startswith("@progress "):
                name, done, total = json.loads(line.removeprefix("@progress "))
                progress(name, done, total)
            elif line.startswith(ENDED):
                code = int(line.removeprefix(ENDED))
    if code == 0:
        return json.loads(answer.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    if code == 2:
        raise UserError(*json.loads(answer.read_text(encoding="utf-8")))
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise RuntimeError(f"the evaluation process failed with exit code {code}; its log is {log}:\n{tail}")


def _can_be_forked(jobs: Sequence[Mapping[str, Any]]) -> bool:
    """Not with a GPU; nor for tasks, whose libraries the ready process leaves out."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available() and not _need_tasks(jobs)


def _fresh_lines(command: Sequence[str], environment: dict[str, str], log: Path) -> Generator[str, None, None]:
    """What a process of its own prints, line by line, `@ended CODE` last."""
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert process.stdout is not None
        try:
            yield from process.stdout
            yield f"{ENDED}{process.wait()}"
        finally:
            process.kill()  # of one that has ended it does nothing
            process.wait()


def run_timings(run: Callable[[], list[Any]]) -> list[Any]:
    """The results of cost jobs that `run` has done; a process that died at it is said as a failed job is."""
    from quantize.worker_jobs import failure

    try:
        return run()
    except RuntimeError as error:
        return [failure(error)]


def _end_with_parent() -> None:
    """The parent holds the other end of stdin: once it is gone, even by SIGKILL, its resumed run writes these files."""
    while os.read(0, 1):  # not through sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


def _leave_out_unused(jobs: Sequence[Mapping[str, Any]]) -> None:
    """A quarter of this process's start are two libraries that transformers imports where they are installed.

    It needs them for assisted decoding and for losses of object detection. lm-eval needs them too: jobs with tasks keep
    them.
    """
    if not _need_tasks(jobs):
        for name in _UNUSED:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # to the import system: not installed


def _let_rewards_import(jobs: Sequence[Mapping[str, Any]]) -> None:
    """A reward of one's own may need what was left out of transformers."""
    if any("rewards" in (job.get("method") or {}) for job in jobs):
        for name in _UNUSED:
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


def _need_tasks(jobs: Sequence[Mapping[str, Any]]) -> bool:
    formats = [form for job in jobs for form in (job, job.get("simulate") or {})]
    return any(job.get("tasks") for job in jobs) or any((f.get("calibration") or {}).get("task") for f in formats)


def _import_libraries() -> None:
    """What nearly every job imports. It stays, so no collection need go over it."""
    with uncollected():
        import transformers.modeling_utils  # noqa: F401

        import quantize.convert
        import quantize.worker_jobs  # noqa: F401
    gc.freeze()


def main(argv: Sequence[str]) -> int:
    """Entry of the process: `python -m quantize.worker REQUEST`, or `--ready` to fork one for each request on stdin."""
    import threading

    if argv[0] == _READY:
        _leave_out_unused(())
        _import_libraries()
        serve(sys.stdin, work)
        return 0
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = Path(argv[0])
    _leave_out_unused(json.loads(request.read_text(encoding="utf-8")))
    _import_libraries()
    with progress_stream() as told:
        return work(request, told)


def work(request: Path, told: TextIO) -> int:
    """Does the jobs of a request in this process, says how far it is on `told`, and returns its exit code."""
    from quantize.worker_jobs import KINDS

    jobs = json.loads(request.read_text(encoding="utf-8"))
    _let_rewards_import(jobs)
    answer = request.with_suffix(".answer.json")
    results = []
    try:
        for job in jobs:

            def report(done: int, total: int, name: str = job["name"]) -> None:
                print("@progress", json.dumps([name, done, total]), file=told, flush=True)

            results.append(KINDS[job["kind"]](job, report))
            gc.collect()
    except UserError as error:
        answer.write_text(json.dumps(error.lines), encoding="utf-8")
        return 2
    forbidden = {"unsloth", "unsloth_zoo", "train", "qat"} & set(sys.modules)
    assert not forbidden, f"the plain process imported {forbidden}"
    answer.write_text(json.dumps(results), encoding="utf-8")
    return 0


def _leave(code: int) -> NoReturn:
    """Ends the process without taking all modules apart, half a second and more; no thread is waited for."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
