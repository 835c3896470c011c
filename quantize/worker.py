"""A fresh process for everything that must happen in the plain graph.

The training process has unsloth's class-level patches at work, so evaluation of what ships and the conversion itself
run here, where neither unsloth nor the training code is imported. `run_jobs` (parent) writes a request, starts
`python -m quantize.worker REQUEST`, forwards its progress and returns its results.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from quantize.errors import UserError
from quantize.imports import uncollected

Progress = Callable[[str, int, int], None]


def run_jobs(
    jobs: Sequence[Mapping[str, Any]], request: Path, progress: Progress | None = None, *, packages: Path | None = None
) -> list[Any]:
    """Runs jobs in a fresh process, in order, and returns one result a job.

    Args:
        jobs: each a mapping with `kind` (see `quantize.worker_jobs`) and that function's arguments.
        request: where the request is written; the answer lies beside it.
        progress: called with (job's name, done, total).
        packages: a folder of packages that this process alone sees (`quantize.export.environment`).

    Raises:
        UserError: what the worker found wrong with the input.
        RuntimeError: the worker failed; the message ends with its last lines, all of them lie beside the request.
    """
    answer, log = request.with_suffix(".answer.json"), request.with_suffix(".log")
    request.parent.mkdir(parents=True, exist_ok=True)
    request.write_text(json.dumps(list(jobs), indent=1), encoding="utf-8")
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    project = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [project, str(packages or ""), environment.get("PYTHONPATH")])
    )
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "quantize.worker", str(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if progress is not None and line.startswith("@progress "):
                    name, done, total = json.loads(line.removeprefix("@progress "))
                    progress(name, done, total)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code == 0:
        return json.loads(answer.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    if code == 2:
        raise UserError(*json.loads(answer.read_text(encoding="utf-8")))
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise RuntimeError(f"the evaluation process failed with exit code {code}; its log is {log}:\n{tail}")


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
    formats = [form for job in jobs for form in (job, job.get("simulate") or {})]
    if not any(job.get("tasks") for job in jobs) and not any((f.get("calibration") or {}).get("task") for f in formats):
        for name in ("sklearn", "scipy"):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # to the import system: not installed


def _import_libraries() -> None:
    """What nearly every job imports. It stays, so no collection need go over it."""
    with uncollected():
        import transformers.modeling_utils  # noqa: F401

        import quantize.convert  # noqa: F401
    gc.freeze()


def main(argv: Sequence[str]) -> int:
    """Entry of the fresh process: `python -m quantize.worker REQUEST`."""
    import threading

    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = Path(argv[0])
    jobs = json.loads(request.read_text(encoding="utf-8"))
    _leave_out_unused(jobs)
    _import_libraries()
    from quantize.worker_jobs import KINDS

    answer = request.with_suffix(".answer.json")
    results = []
    try:
        for job in jobs:

            def report(done: int, total: int, name: str = job["name"]) -> None:
                print("@progress", json.dumps([name, done, total]), flush=True)

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
