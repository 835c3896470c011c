"""A run that is killed, stopped or refused at any point loses nothing and gives the same metrics in the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wandb_files import wandb_exits

from quantize.errors import UserError
from train.events import Event

TINY = ("--config", "tiny.yaml", "--qat", "int8-int4", "--eval.cost-batches=[]")


def _kill_when(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """SIGKILL for the process and its children as soon as `reached` says so."""
    deadline = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def test_a_run_killed_while_it_trains_resumes_to_the_same_metrics(finished: Path, runs: Any) -> None:
    process = runs.start(*TINY, "--run.name=killed")
    for line in process.stdout:
        if "fit-tuned: 6/8" in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert not (runs.root / "killed" / "metrics.json").exists()
    assert (runs.root / "killed" / "checkpoints" / "checkpoint-4").is_dir()
    cut_short = runs.root / "killed" / "checkpoints" / "checkpoint-6"  # as a kill between two of its files leaves it
    cut_short.mkdir()
    (cut_short / "trainer_state.json").write_text('{"global_step": 6')
    done = runs.train("--resume", "killed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fit-control: already done" in done.stdout
    assert runs.metrics(runs.root / "killed") == runs.metrics(finished)


def test_a_run_killed_while_it_converts_resumes_to_the_same_checkpoint(finished: Path, runs: Any) -> None:
    """Everything up to the conversion is taken from a finished run; the kill comes while the checkpoint is written."""
    run = runs.root / "halved"
    _copy_run(finished, run)
    _forget(run, "quantise", "final")
    for name in ("quantized", "eval/quantise.request.json"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    process = runs.start("--resume", str(run))
    _kill_when(process, lambda: (run / "quantized.partial").exists())
    assert _stages(run)["quantise"]["status"] == "running"
    (run / "quantized.partial").mkdir(exist_ok=True)
    (run / "quantized.partial" / "model.safetensors").write_bytes(b"half of a file")
    done = runs.train("--resume", str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (run / "quantized.partial").exists()
    assert runs.metrics(run) == runs.metrics(finished)
    assert (run / "quantized" / "config.json").read_bytes() == (finished / "quantized" / "config.json").read_bytes()
    ours, theirs = (_tensors(folder / "quantized" / "model.safetensors") for folder in (run, finished))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_the_converting_process_ends_with_its_parent(finished: Path, runs: Any) -> None:
    """A parent that is killed alone (by the kernel, for memory) leaves no process that writes on in its run."""
    run = runs.root / "orphan"
    _copy_run(finished, run)
    _forget(run, "quantise", "final")
    (run / "eval" / "quantise.request.json").unlink()
    process = runs.start("--resume", str(run))
    while not (run / "eval" / "quantise.request.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = _children(process.pid)
    while not children:
        assert process.poll() is None
        children = _children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # returns once the children have closed the pipes too
    deadline = time.monotonic() + 30
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_broken_off_at_every_boundary_gives_the_same_metrics(finished: Path, runs: Any) -> None:
    """In one process, with the peft backend: each attempt dies at the next boundary, before or after it is recorded."""
    from train.config_loading import load_config
    from train.pipeline import resume, run

    options = ["--qat=int8-int4", "--model.backend=peft", f"--run.root={runs.root}"]
    whole = run(load_config("tiny.yaml", [*options, "--run.name=in-one-go"]), sinks=[])

    seen: set[tuple[str, str]] = set()

    class Died(BaseException):
        pass

    class DyingSink:
        """Dies at the next boundary that no attempt has come to yet."""

        def emit(self, event: Event) -> None:
            if event.kind in ("stage_started", "stage_finished"):
                boundary = (event.kind, event.data["stage"])
                if boundary not in seen:
                    seen.add(boundary)
                    raise Died(boundary)

        def close(self) -> None:
            pass

    config = load_config("tiny.yaml", [*options, "--run.name=piecemeal"])
    attempts = 0
    while True:
        attempts += 1
        try:
            result = run(config, sinks=[DyingSink()])
            break
        except Died:
            continue
    stages = _stages(whole.path)
    assert attempts == 2 * len(stages) + 1
    assert _without_timings(result.metrics) == _without_timings(whole.metrics)
    assert result.report.splitlines()[2:12] == whole.report.splitlines()[2:12]
    again = resume("piecemeal", root=str(runs.root))
    assert again.metrics == result.metrics, "what was timed is not timed again"


def _without_timings(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key != "cost"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_saves_the_state_and_says_how_to_go_on(number: int, code: int, runs: Any) -> None:
    """SIGTERM is also how W&B's agent ends a run early, which is finished for W&B then, not failed."""
    name = f"stopped-{code}"
    tracked = ["--track.wandb=offline"] if number == signal.SIGTERM else []
    process = runs.start(
        "--config", "tiny.yaml", f"--run.name={name}", "--train.max-steps=500", "--train.save-steps=400", *tracked
    )
    for line in process.stdout:
        if "fit-tuned: " in line:
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors[-3000:]
    assert f"stopped; continue with: train --resume {runs.root / name}" in errors
    assert "Traceback" not in errors
    assert list((runs.root / name / "checkpoints").glob("checkpoint-*"))
    assert wandb_exits(runs.root / name) == [0 for _ in tracked]


def test_a_second_command_on_a_run_at_work_is_refused(finished: Path, runs: Any) -> None:
    import fcntl

    with (finished / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        done = runs.train("--resume", str(finished))
    assert done.returncode == 2
    assert "in use by another process" in done.stderr


def test_the_folder_of_another_run_is_refused_and_left_alone(finished: Path, runs: Any) -> None:
    before = (finished / "manifest.json").read_bytes()
    done = runs.train(*TINY, "--run.name=whole", "--train.learning-rate=1e-3")
    assert done.returncode == 2
    assert "holds another run" in done.stderr
    assert (finished / "manifest.json").read_bytes() == before


def test_a_full_disk_is_found_before_training(monkeypatch: pytest.MonkeyPatch, runs: Any) -> None:
    from train.config_loading import load_config
    from train.pipeline import run

    usage = shutil.disk_usage(runs.root)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    options = ["--model.backend=peft", f"--run.root={runs.root}", "--run.name=full-disk"]
    with pytest.raises(UserError, match=r"GiB free, this run needs about"):
        run(load_config("tiny.yaml", options), sinks=[])
    assert "fit-tuned" not in _stages(runs.root / "full-disk")


def test_a_disk_that_fills_up_is_the_users_to_solve(capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    from train.cli import _report

    assert _report(OSError(errno.ENOSPC, "No space left on device", "runs/x/merged"), debug=False) == 2
    assert capsys.readouterr().err.startswith("error: No space left on device (runs/x/merged); free some space")


def _tensors(file: Path) -> dict[str, Any]:
    """Tensors by name; a safetensors file's header has no fixed order."""
    from safetensors.numpy import load_file

    return load_file(file)


def _copy_run(source: Path, target: Path) -> None:
    """A copy that knows its own place."""
    shutil.copytree(source, target)
    for name in ("config.resolved.json", "manifest.json", "config.yaml"):
        text = (target / name).read_text().replace(str(source), str(target))
        (target / name).write_text(text)


def _stages(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["stages"]  # type: ignore[no-any-return]


def _forget(run: Path, *stages: str) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    for stage in stages:
        del manifest["stages"][stage]
    (run / "manifest.json").write_text(json.dumps(manifest))


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
