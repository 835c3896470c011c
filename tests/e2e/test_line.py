"""The whole line on the tiny model: one run of everything, then what users do to runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TRAIN = [sys.executable, "-m", "train"]
ARMS = ("base", "base_quantized", "control", "ptq", "tuned", "final")


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
    }


def _train(*options: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [*TRAIN, *options, f"--run.root={root}"]
    return subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=400)


def _metrics(path: Path) -> dict[str, Any]:
    return json.loads((path / "metrics.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One root for all runs, so that baselines and models are made once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    """An unbroken int8-int4 run."""
    done = _train("--config", "tiny.yaml", "--qat", "int8-int4", "--run.name=whole", root=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "whole"


def test_what_is_trained_is_what_is_shipped(finished: Path) -> None:
    metrics = _metrics(finished)
    assert metrics["train_ship_gap"] == 0.0
    assert abs(metrics["backend_gap"]) < 1e-4
    assert all(metrics[arm]["loss"] > 0 for arm in ARMS)
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    assert not metrics["simulated"]
    assert metrics["coverage"]["quantized_fraction"] == 1.0
    assert metrics["coverage"]["skipped"].keys() == {"lm_head"}
    for name in ("report.md", "report.html", "events.jsonl", "config.yaml", "adapter/adapter_model.safetensors"):
        assert (finished / name).stat().st_size > 0


def test_the_checkpoint_loads_with_plain_transformers_and_is_quantised(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "quantized")
    assert type(model.model.layers[0].mlp.down_proj.weight.data).__name__ == "IntxUnpackedToInt8Tensor"
    assert AutoTokenizer.from_pretrained(finished / "quantized").chat_template


def test_a_killed_run_resumes_to_the_same_metrics(finished: Path, root: Path) -> None:
    command = [*TRAIN, "--config", "tiny.yaml", "--qat", "int8-int4", f"--run.root={root}", "--run.name=killed"]
    process = subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "fit-tuned: 6/8" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait(timeout=60)
    assert not (root / "killed" / "metrics.json").exists()
    done = _train("--resume", "killed", root=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fit-control: already done" in done.stdout
    assert _metrics(root / "killed") == _metrics(finished)


def test_sigterm_saves_the_state_and_says_how_to_go_on(finished: Path, root: Path) -> None:
    command = [*TRAIN, "--config", "tiny.yaml", f"--run.root={root}", "--run.name=stopped", "--train.max-steps=500"]
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if "fit-tuned: " in line:
            process.send_signal(signal.SIGTERM)
            break
    started = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors[-3000:]
    assert "train --resume" in errors and time.monotonic() - started < 120
    assert list((root / "stopped" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_a_target_that_does_not_run_here_is_simulated_and_said_so(scheme: str, root: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine may run the target")
    options = ["--config", "tiny.yaml", "--qat", scheme, "--eval.control=False", f"--run.name=sim-{scheme}"]
    done = _train(*options, root=root)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = _metrics(root / f"sim-{scheme}")
    assert metrics["simulated"] and metrics["final"]["simulated"]
    assert not (root / f"sim-{scheme}" / "quantized").exists()
    assert (root / f"sim-{scheme}" / "merged" / "config.json").is_file()
    assert "quantize convert" in (root / f"sim-{scheme}" / "report.md").read_text()


def test_the_peft_backend_agrees_with_unsloth(finished: Path, root: Path) -> None:
    done = _train(
        "--config", "tiny.yaml", "--qat", "int8-int4", "--model.backend=peft", "--run.name=peft", root=root
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = _metrics(finished), _metrics(root / "peft")
    assert theirs["train_ship_gap"] == 0.0
    assert abs(ours["final"]["loss"] - theirs["final"]["loss"]) < 0.01


def test_no_adapters_means_full_fine_tuning(root: Path) -> None:
    options = ["--lora=None", "--train.learning-rate=1e-3", "--eval.control=False", "--run.name=full"]
    done = _train("--config", "tiny.yaml", "--qat", "int8-int4", *options, root=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert _metrics(root / "full")["train_ship_gap"] == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--qat", "int9"], "unknown scheme"),
        (["--train.learning_rat=1"], "did you mean"),
        (["--model.id=nowhere/nothing", "--model.random=None"], "model.id"),
        (["--data.train=nowhere.jsonl"], "no file nowhere.jsonl"),
        (["--qat=int8-int4", "--quantize.group-size=256"], "group size 256 does not divide"),
        (["--data.format=alpaca"], "instruction"),
        (["--train.max-length=8"], "no trainable token after truncation"),
    ],
)
def test_bad_input_is_exit_2_without_traceback(options: list[str], said: str, root: Path) -> None:
    done = _train("--config", "tiny.yaml", *options, root=root)
    assert done.returncode == 2, done.stderr[-3000:]
    assert said in done.stderr
    assert "Traceback" not in done.stderr
