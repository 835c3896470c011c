"""The line on the tiny model in its other formats, backends and ways to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY


@pytest.mark.parametrize(
    ("training", "merged"),
    [("float32", "bfloat16"), pytest.param("bfloat16", "float32", marks=pytest.mark.slow)],
)
def test_what_ships_is_compared_in_the_dtype_that_ships(training: str, merged: str, runs: Any) -> None:
    dtypes = (f"--model.dtype={training}", f"--quantize.dtype={merged}", "--eval.control=False")
    run = runs.finish(*TINY, *dtypes, f"--run.name=merged-{merged}")
    assert runs.metrics(run)["train_ship_gap"] == 0.0


def test_layers_that_are_skipped_train_and_ship_in_16_bit(runs: Any) -> None:
    skip = '--quantize.skip=["o_proj","model.layers.1"]'
    run = runs.finish(*TINY, skip, "--eval.control=False", "--run.name=skip")
    metrics = runs.metrics(run)
    assert metrics["train_ship_gap"] == 0.0 and 0 < metrics["coverage"]["quantized_fraction"] < 0.5
    kept = {name for name, reason in metrics["coverage"]["skipped"].items() if "quantize.skip" in reason}
    assert len(kept) == 8 and "model.layers.0.self_attn.o_proj" in kept
    done = runs.train(*TINY, '--quantize.skip=["o_prj"]', "--run.name=skip-wrong")
    assert done.returncode == 2 and "'o_prj' fits no linear layer" in done.stderr and "fit-" not in done.stdout


@pytest.mark.parametrize("scheme", ["int4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_target_that_does_not_run_here_is_simulated_and_said_so(scheme: str, runs: Any) -> None:

    if torch.cuda.is_available():
        pytest.skip("this machine may run the target")
    run = runs.finish("--config", "tiny.yaml", "--qat", scheme, "--eval.control=False", f"--run.name=sim-{scheme}")
    metrics = runs.metrics(run)
    assert metrics["simulated"] and metrics["final"]["simulated"]
    assert not (run / "quantized").exists()
    assert (run / "merged" / "config.json").is_file()
    assert f"quantize convert {run} --target" in (run / "report.md").read_text()
    refused = runs.quantize("convert", str(run))
    assert refused.returncode == 2 and "this machine lacks a CUDA GPU" in refused.stderr


def test_the_peft_backend_agrees_with_unsloth(finished: Path, runs: Any) -> None:
    ours, theirs = runs.metrics(finished), runs.metrics(runs.finish(*TINY, "--model.backend=peft", "--run.name=peft"))
    assert theirs["train_ship_gap"] == 0.0
    assert abs(ours["final"]["loss"] - theirs["final"]["loss"]) < 0.01


def test_no_adapters_means_full_fine_tuning(runs: Any) -> None:
    options = ("--lora=None", "--train.learning-rate=1e-3", "--eval.control=False", "--run.name=full")
    run = runs.finish(*TINY, *options)
    assert runs.metrics(run)["train_ship_gap"] == 0.0
    # As after a kill between the last step and the merge: the weights come back from the run directory.
    before = (run / "metrics.json").read_bytes()
    manifest = json.loads((run / "manifest.json").read_text())
    for stage in ("merge-tuned", "arms", "quantise", "final"):
        del manifest["stages"][stage]
    (run / "manifest.json").write_text(json.dumps(manifest))
    again = runs.train("--resume", str(run))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "fit-tuned: already done" in again.stdout
    assert (run / "metrics.json").read_bytes() == before


def test_the_mobile_recipe_quantises_embedding_and_lm_head(runs: Any) -> None:
    from safetensors import safe_open

    options = ("--qat", "int8-int4-mobile", "--eval.control=False", "--run.name=mobile")
    run = runs.finish("--config", "tiny.yaml", *options)
    metrics = runs.metrics(run)
    assert metrics["train_ship_gap"] == 0.0
    assert metrics["coverage"]["skipped"] == {}
    settings = json.loads((run / "quantized" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False
    (file,) = (run / "quantized").glob("*.safetensors")
    with safe_open(file, "np") as stored:
        names = set(stored.keys())
    for layer in ("lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"):
        assert any(name.startswith(f"{layer}.") and "qdata" in name for name in names), sorted(names)[:20]


def test_without_qat_a_scheme_means_quantisation_after_training(runs: Any) -> None:
    chosen = ("--quantize.algorithm=[gptq,awq]", "--quantize.calibration-samples=16")
    run = runs.finish("--config", "tiny.yaml", "--quantize.scheme=int8-int4", *chosen, "--run.name=ptq")
    metrics = runs.metrics(run)
    assert "numbers chosen by awq, gptq, calibrated on 16 samples of train.parquet" in (run / "report.md").read_text()
    assert metrics["layers"] == {} and "awq changed the layers" in metrics["why"]["sqnr"]
    assert json.loads((run / "quantized" / "ongrid.json").read_text())["algorithms"] == ["awq", "gptq"]
    assert metrics["control"]["loss"] is None and metrics["why"]["control"]
    assert metrics["train_ship_gap"] is None
    assert metrics["final"]["loss"] > 0 and (run / "quantized" / "config.json").is_file()


def test_4_bit_loading_trains_adapters_for_the_16_bit_weights(runs: Any) -> None:
    options = ("--model.load-in-4bit=True", "--model.backend=peft", "--run.name=qlora")
    metrics = runs.metrics(runs.finish("--config", "tiny.yaml", *options))
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    assert metrics["final"]["loss"] is None and "nothing is quantised" in metrics["why"]["final"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["unsloth", "peft"])
def test_packing_changes_the_padding_and_nothing_else(backend: str, runs: Any) -> None:
    """One step over the same samples, once padded and once packed: the same loss, of weights that attend strongly."""
    options = ["--config", "tiny.yaml", f"--model.backend={backend}", "--data.train-samples=16", "--train.max-steps=1"]
    options.append("--model.shape.initializer_range=0.3")
    losses = []
    for packing in (False, True):
        name = f"--run.name=packing-{backend}-{packing}"
        run = runs.finish(*options, "--train.per-device-train-batch-size=16", f"--data.packing={packing}", name)
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        losses.append(next(event["loss"] for event in events if event["kind"] == "step"))
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
