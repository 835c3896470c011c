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


@pytest.mark.parametrize(
    ("options", "tolerance", "largest_gap"),
    [
        # bf16 autocast would show as a backend_gap above 1e-4 even on this small model.
        (("--model.dtype=float32", "--quantize.dtype=float32"), 1e-4, 1e-5),
        ((), 0.01, 0.01),
    ],
    ids=["float32", "bfloat16"],
)
def test_unsloth_and_peft_train_alike(
    options: tuple[str, ...], tolerance: float, largest_gap: float, tmp_path: Path
) -> None:
    command = [sys.executable, "benchmarks/backends.py", "--config", "tiny.yaml", "--schemes", "int8-int4"]
    command += ["--root", str(tmp_path), "--tolerance", str(tolerance), "--", "--eval.control=False", *options]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for backend in ("unsloth", "peft"):
        metrics = json.loads((tmp_path / f"tiny-int8-int4-{backend}" / "metrics.json").read_text())
        assert metrics["train_ship_gap"] == 0
        assert abs(metrics["backend_gap"]) <= largest_gap
