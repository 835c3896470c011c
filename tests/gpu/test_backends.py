"""On a GPU: both backends train the same function, and float32 means float32.

`pytest -m gpu tests/gpu`
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_unsloth_and_peft_train_alike_in_float32(tmp_path: Path) -> None:
    # Without fake quantisation: rounding activations turns a last-bit difference into another rounding
    # (benchmarks/rounding_noise.py). bf16 autocast in one of the two would show as 1e-3 and more.
    losses = {}
    for backend in ("unsloth", "peft"):
        command = [sys.executable, "-m", "train", "--config", "tiny.yaml", f"--model.backend={backend}"]
        command += ["--model.dtype=float32", "--quantize.dtype=float32"]
        command += [f"--run.root={tmp_path}", f"--run.name={backend}"]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        events = map(json.loads, (tmp_path / backend / "events.jsonl").read_text().splitlines())
        losses[backend] = [event["loss"] for event in events if event["kind"] == "step"]
        metrics = json.loads((tmp_path / backend / "metrics.json").read_text())
        assert abs(metrics["backend_gap"]) < 1e-5
    assert losses["unsloth"] == pytest.approx(losses["peft"], abs=1e-4)


def test_unsloth_goes_from_16_bit_to_fake_quantisation_half_way(tmp_path: Path) -> None:
    # Until the switch unsloth compiles each decoder layer as one region, then its fused kernels call the projections.
    command = [sys.executable, "-m", "train", "--config", "tiny.yaml", "--qat=int8-int4", "--model.backend=unsloth"]
    command += ["--eval.control=True", f"--run.root={tmp_path}", "--run.name=half"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    events = map(json.loads, (tmp_path / "half" / "events.jsonl").read_text().splitlines())
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    control, tuned = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    half = len(tuned) // 2
    assert tuned[:half] == pytest.approx(control[:half], abs=1e-3)
    assert tuned[half:] != pytest.approx(control[half:], abs=1e-3)
    assert json.loads((tmp_path / "half" / "metrics.json").read_text())["train_ship_gap"] == 0
