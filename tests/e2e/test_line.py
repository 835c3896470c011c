"""The whole line on the tiny model: one run of everything, and what users meet on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Runs

ARMS = ("base", "base_quantized", "control", "ptq", "tuned", "final")


def test_what_is_trained_is_what_is_shipped(finished: Path, runs: Any) -> None:
    metrics = runs.metrics(finished)
    assert metrics["train_ship_gap"] == 0.0
    assert abs(metrics["backend_gap"]) < 1e-4
    assert all(metrics[arm]["loss"] > 0 for arm in ARMS)
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    assert not metrics["simulated"]
    assert metrics["coverage"]["quantized_fraction"] == 1.0
    assert metrics["coverage"]["skipped"].keys() == {"lm_head"}
    for name in ("report.md", "report.html", "events.jsonl", "config.yaml", "adapter/adapter_model.safetensors"):
        assert (finished / name).stat().st_size > 0


def test_a_run_works_under_a_relative_root(tmp_path: Path) -> None:
    near = Runs(Path(os.path.relpath(tmp_path)))
    run = near.finish(*TINY, "--eval.control=False", "--run.name=near")
    assert near.metrics(run)["train_ship_gap"] == 0.0
    assert {path.name for path in run.iterdir() if path.is_dir()} == {
        "adapter", "checkpoints", "data", "eval", "grid", "merged", "plots", "quantized",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {".cache", "near"}


@pytest.mark.slow
def test_a_finished_run_that_lost_files_makes_them_anew(finished: Path, runs: Any) -> None:
    run = runs.root / "lost"
    shutil.copytree(finished, run)
    for name in ("merged", "quantized", "grid"):
        shutil.rmtree(run / name)
    (run / "eval" / "ptq.parquet").unlink()
    done = runs.train("--resume", str(run))
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.metrics(run) == runs.metrics(finished)


def test_the_checkpoint_loads_with_plain_transformers_and_is_quantised(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "quantized")
    assert type(model.model.layers[0].mlp.down_proj.weight.data).__name__ == "IntxUnpackedToInt8Tensor"
    assert AutoTokenizer.from_pretrained(finished / "quantized").chat_template


def test_the_same_command_again_finds_everything_done(finished: Path, runs: Any) -> None:
    before = (finished / "metrics.json").read_bytes()
    done = runs.train(*TINY, "--run.name=whole")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fit-tuned: already done" in done.stdout and "final: already done" in done.stdout
    assert (finished / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--qat", "int9"], "unknown scheme"),
        (["--train.learning_rat=1"], "did you mean"),
        (["--model.id=nowhere/nothing", "--model.random=None"], "model.id: nowhere/nothing is no local folder"),
        (["--data.train=nowhere.jsonl"], "no file nowhere.jsonl"),
        (["--data.train=nobody/nothing"], "data: nobody/nothing is no local file, and HF_HUB_OFFLINE is set"),
        (["--qat=int8-int4", "--quantize.group-size=256"], "group size 256 does not divide"),
        (["--data.format=alpaca"], "instruction"),
        (["--train.max-length=8"], "no trainable token after truncation"),
        (["--lora.use_dora=True"], "set model.backend=peft"),
        (["--lora.target_modules=['q_porj']"], "lora.target_modules=['q_porj']: "),
        (["--train.report_to=mlflow"], "mlflow is not installed"),
        (["--run.root=/proc/nowhere"], "cannot be written"),
        (["--train.learning-rate=1e30", "--train.max-grad-norm=0"], "on the data rows"),
    ],
)
def test_bad_input_is_exit_2_without_traceback(options: list[str], said: str, runs: Any) -> None:
    done = runs.train("--config", "tiny.yaml", *options)
    assert done.returncode == 2, done.stderr[-3000:]
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_all_that_is_wrong_is_said_at_once(runs: Any) -> None:
    done = runs.train(
        "--config", "tiny.yaml", "--data.train=gone.jsonl", "--data.eval=lost.csv", "--qat=int9", "--train.step=8"
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4, done.stderr
    for said in ("gone.jsonl", "lost.csv", "int9", "train.step"):
        assert said in done.stderr


def test_other_trackers_of_transformers_are_told_every_step(runs: Any) -> None:
    options = ("--train.report_to=tensorboard", "--model.backend=peft", "--run.name=board")
    run = runs.finish("--config", "tiny.yaml", *options)
    assert list(run.rglob("events.out.tfevents.*"))


def test_wandb_offline_keeps_its_run_id_when_the_run_is_continued(runs: Any) -> None:
    options = ("--track.wandb=offline", "--model.backend=peft", "--run.name=tracked")
    run = runs.finish("--config", "tiny.yaml", *options)
    run_id = json.loads((run / "manifest.json").read_text())["wandb_run_id"]
    again = runs.train("--resume", str(run))
    assert again.returncode == 0, again.stderr[-3000:]
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(run_id) for folder in folders)


@pytest.mark.slow
def test_a_model_with_code_of_its_own_runs_where_it_is_trusted(finished: Path, runs: Any, tmp_path: Path) -> None:
    model = tmp_path / "own"
    shutil.copytree(finished / "merged", model)
    settings = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    settings |= {"model_type": "own-qwen", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "modeling_own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n\n\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own-qwen'\n\n\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    options = (*TINY, "--model.random=None", f"--model.id={model}", "--eval.control=False", "--run.name=own")
    refused = runs.train(*options)
    assert refused.returncode == 2
    assert "brings Python code of its own (modeling_own.OwnForCausalLM)" in refused.stderr
    run = runs.finish(*options, "--model.trust-remote-code=True")
    assert runs.metrics(run)["train_ship_gap"] == 0.0
    assert (run / "quantized" / "modeling_own.py").is_file()


def _benchmark(name: str, *options: str) -> str:
    """What a script of benchmarks/ prints."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / name
    command = [sys.executable, str(script), "--config", "tiny.yaml", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=script.parents[1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8-int4", "none"])
def test_the_benchmark_of_both_backends_compares_them(scheme: str, tmp_path: Path) -> None:
    assert _benchmark("backends.py", "--schemes", scheme, "--root", str(tmp_path)).rstrip().endswith("agree")


@pytest.mark.slow
def test_the_benchmark_of_rounding_noise_finds_little_without_rounding(tmp_path: Path) -> None:
    printed = _benchmark("rounding_noise.py", "--schemes", "int8-int4", "--root", str(tmp_path))
    plain, rounded = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    assert plain["scheme"] is None and rounded["scheme"] == "int8-int4"
    assert plain["mean |difference| of a sample"] < min(1e-4, rounded["mean |difference| of a sample"])


@pytest.mark.slow
def test_the_benchmark_of_recovery_trains_measures_and_goes_on(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "recovery.py"
    small = ["--model.random=tiny", "--train.max-steps=3", "--train.warmup-steps=0", "--data.train-samples=200"]
    small += ["--data.eval-samples=40", "--train.per-device-train-batch-size=8"]
    small += [f"--data.{name}=examples/data/reasoning_{name}.jsonl" for name in ("train", "eval")]
    arms = ["control", "ptq", "hqq", "outside", "inside", "distill-mse-learned", "after100-distill-learned"]
    arms += ["longer", "ptq-longer"]
    command = [sys.executable, str(script), "--root", str(tmp_path), "--scheme", "int3", "--arm", *arms]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--", *small], capture_output=True, text=True, timeout=280, cwd=script.parents[1]
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        assert [line["arm"] for line in lines] == arms  # the second time nothing is left to do
    assert {line["gap"] for line in lines[4:-2]} == {0.0} and lines[3]["gap"] != 0
    assert all(line["layers"] == 14 for line in lines if line["scheme"])
    table = subprocess.run([*command, "--summary"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert table.count("\n") == 5 + len(arms)  # a heading, the head of the table, an empty line
