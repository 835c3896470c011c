"""A sweep from the command line on the tiny model: stopped in the middle, taken up again, one process each time."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna")


SWEEP = {
    "command": ["train", "--config", "tiny.yaml", "--model.backend=peft", "${args}"],
    "method": "grid",
    "metric": {"name": "tuned.loss", "goal": "minimize"},
    "parameters": {
        "train.learning_rate": {"values": [0.001, 0.005, 0.02]},
        "lora.r": {"values": [4, 8]},
        "train.max_steps": {"value": 6},
        "data.eval_samples": {"value": 16},
        "train.extra": {"value": {"logging_first_step": True}},
    },
}
"""Without a format, so that a trial has one process that measures; what a format adds is every other test's matter."""


@pytest.mark.slow
def test_six_trials_stopped_in_the_middle_and_taken_up(runs: Any, tmp_path: Path) -> None:
    file, root = tmp_path / "six.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
    words = ["--sweep", str(file), f"--run.root={root}"]
    process = runs.start(*words)
    third = root / "six-002" / "events.jsonl"
    deadline = time.monotonic() + 150
    while not (third.is_file() and '"step": 2' in third.read_text()):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors[-3000:]
    assert "stopped; continue with: train --run.root" in errors and "Traceback" not in errors
    assert len(list((root / "six-002" / "checkpoints").glob("checkpoint-*/complete"))) >= 1
    begun = {name: (root / name / "metrics.json").stat().st_mtime_ns for name in ("six-000", "six-001")}

    done = runs.train(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 have ended already" in done.stdout and "trial 2 (3 of 6), which was begun before" in done.stdout
    found = json.loads((root / "sweeps" / "six" / "sweep.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 6
    assert begun == {name: (root / name / "metrics.json").stat().st_mtime_ns for name in begun}
    values = {trial["number"]: trial["value"] for trial in found["trials"]}
    for number, value in values.items():
        assert value == runs.metrics(root / f"six-{number:03d}")["tuned"]["loss"]
    assert found["best"]["value"] == min(values.values()) and len(set(values.values())) == 6
    requests = sorted(root.glob("six-*/eval/baseline.request.json"))
    assert [path.parts[-3] for path in requests] == ["six-000"], "the untouched model was evaluated once"
    assert len(list((root / ".cache" / "data").iterdir())) == 1
