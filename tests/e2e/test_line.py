"""The whole line on the tiny model: one run of everything, then its variants."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Runs

TINY = ("--config", "tiny.yaml", "--qat", "int8-int4", "--eval.cost-batches=[]")
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


@pytest.mark.parametrize(
    ("training", "merged"),
    [("float32", "bfloat16"), pytest.param("bfloat16", "float32", marks=pytest.mark.slow)],
)
def test_what_ships_is_compared_in_the_dtype_that_ships(training: str, merged: str, runs: Any) -> None:
    dtypes = (f"--model.dtype={training}", f"--quantize.dtype={merged}", "--eval.control=False")
    run = runs.finish(*TINY, *dtypes, f"--run.name=merged-{merged}")
    assert runs.metrics(run)["train_ship_gap"] == 0.0


def test_a_run_works_under_a_relative_root(tmp_path: Path) -> None:
    near = Runs(Path(os.path.relpath(tmp_path)))
    run = near.finish(*TINY, "--eval.control=False", "--run.name=near")
    assert near.metrics(run)["train_ship_gap"] == 0.0
    assert {path.name for path in run.iterdir() if path.is_dir()} == {
        "adapter", "checkpoints", "data", "eval", "grid", "merged", "plots", "quantized",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {".cache", "near"}


def test_layers_that_are_skipped_train_and_ship_in_16_bit(runs: Any) -> None:
    skip = '--quantize.skip=["o_proj","model.layers.1"]'
    run = runs.finish(*TINY, skip, "--eval.control=False", "--run.name=skip")
    metrics = runs.metrics(run)
    assert metrics["train_ship_gap"] == 0.0 and 0 < metrics["coverage"]["quantized_fraction"] < 0.5
    kept = {name for name, reason in metrics["coverage"]["skipped"].items() if "quantize.skip" in reason}
    assert len(kept) == 8 and "model.layers.0.self_attn.o_proj" in kept
    done = runs.train(*TINY, '--quantize.skip=["o_prj"]', "--run.name=skip-wrong")
    assert done.returncode == 2 and "'o_prj' fits no linear layer" in done.stderr and "fit-" not in done.stdout


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


LOCAL_TASKS = '["examples/tasks/choices.yaml","examples/tasks/answers.yaml","examples/tasks/perplexity.yaml"]'


@pytest.mark.timeout(600)
def test_tasks_run_on_every_arm_and_their_results_lie_side_by_side(runs: Any) -> None:
    import pyarrow.parquet

    options = (f"--eval.tasks={LOCAL_TASKS}", "--eval.limit=6", "--eval.chat-template=True", "--eval.cost-batches=1,2")
    run = runs.finish(*TINY, *options, "--run.name=tasks")
    metrics = runs.metrics(run)
    cost = metrics["cost"]
    for model in (cost["tuned"], cost["final"]):
        assert model["prefill_tokens_per_s"] > 0 and model["peak_mib"] > 100 and set(model["decode_ms"]) == {"1", "2"}
    assert cost["ratio"]["decode_ms"]["2"] == cost["tuned"]["decode_ms"]["2"] / cost["final"]["decode_ms"]["2"]
    assert list(metrics["tasks"]) == ["choices", "answers", "perplexity"]
    for task in metrics["tasks"].values():
        assert task["n_samples"] == 6 and all(task[arm]["value"] is not None for arm in ARMS)
        assert set(task["comparisons"]) == set(metrics["comparisons"])
    tables = [pyarrow.parquet.read_table(run / "eval" / f"{arm}.tasks.parquet") for arm in ARMS]
    assert all(table["doc_hash"] == tables[0]["doc_hash"] and table.num_rows == 18 for table in tables)
    held_out = pyarrow.parquet.read_table(run / "eval" / "final.parquet").to_pydict()
    assert held_out["prompt"][0].endswith("<|im_start|>assistant\n") and held_out["answer"][0].endswith("<|im_end|>")
    assert len(held_out["greedy"][0]) == held_out["tokens"][0] and held_out["top1"][0] <= held_out["tokens"][0]
    report = (run / "report.md").read_text()
    for words in (
        "## Tasks",
        "decoding 2 at a time",
        "## Which layer hurts",
        "## Where it lost most",
        "| perplexity | word perplexity | 6 |",
        "at most 6 samples of each",
        "| eval.limit | 6 |",
        "| data.train_samples |",
        "| lm_eval |",
    ):
        assert words in report
    assert (run / "plots" / "forest.png").stat().st_size > 1000
    shared = runs.root / ".cache" / "baseline"

    def kept(arm: str) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in shared.glob(f"{arm}-*/**/*.parquet")}

    before = kept("base"), kept("base_quantized")
    assert all(before)
    again = runs.finish(*TINY, *options, "--run.name=tasks-again", "--train.learning-rate=2e-3",
                        "--data.train-samples=100")  # fmt: skip
    assert (kept("base"), kept("base_quantized")) == before
    assert runs.metrics(again)["tasks"]["choices"]["base"] == metrics["tasks"]["choices"]["base"]
    other = runs.finish(*TINY, *options, "--run.name=tasks-groups", "--quantize.skip=o_proj", "--eval.control=False")
    assert kept("base") == before[0] and kept("base_quantized").items() > before[1].items()
    assert runs.metrics(other)["tasks"]["choices"]["base"] == metrics["tasks"]["choices"]["base"]


def test_a_timing_that_fails_costs_its_section_not_the_report(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from quantize import cost, worker
    from quantize.run_report import write_report

    def fails(model: Any, batches: Any, compiled: bool) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB\nand more")

    monkeypatch.setattr(cost, "measure_cost", fails)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    job = {"model": str(run / "merged"), "dtype": "float32", "batches": [1], "compiled": True}
    measured = worker.cost(job, lambda done, total: None)
    assert measured == {"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 TiB"}
    gone = worker.cost(job | {"model": str(run / "gone")}, lambda done, total: None)
    assert gone["failed"].startswith("OSError: ")

    def dies() -> Any:
        raise RuntimeError("the evaluation process failed with exit code -9; its log is cost.request.log:\nKilled")

    assert worker.run_timings(dies)[0]["failed"].endswith("its log is cost.request.log:")
    gathered = json.loads((run / "gathered.json").read_text()) | {"cost_batches": [1], "cost": [measured, measured]}
    metrics, text = write_report(run, gathered)
    assert metrics["cost"]["ratio"] is None and "Tried to allocate 3 TiB" in metrics["why"]["cost"]
    assert "Not measured: the timing failed (OutOfMemoryError: CUDA out of memory." in text


def test_a_task_that_cannot_be_loaded_ends_the_run_before_training(runs: Any, tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test\n"
    )
    for name, said in (
        (str(task), "mine cannot be loaded"),
        ("gsm8k", "gsm8k cannot be loaded"),
        ("gsm9", "did you mean"),
    ):
        done = runs.train(*TINY, f'--eval.tasks=["{name}"]', f"--run.name=refused-{Path(name).stem}")
        assert done.returncode == 2, done.stderr[-2000:]
        assert said in done.stderr and "Traceback" not in done.stderr
        assert "fit-" not in done.stdout


def test_every_key_of_the_metrics_is_there_or_has_its_reason(finished: Path, runs: Any) -> None:
    metrics = runs.metrics(finished)
    contract = [
        *(f"{arm}.{name}" for arm in ARMS for name in ("loss", "accuracy")),
        "train_ship_gap", "backend_gap", "recovered", "kl.final", "size.tuned_mib", "size.final_mib",
        "size.bits_per_weight", "coverage.quantized_fraction", "coverage.skipped", "scheme", "target", "simulated",
    ]  # fmt: skip
    for dotted in contract:
        value: Any = metrics
        for key in dotted.split("."):
            assert key in value, dotted
            value = value[key]
        explained = any(dotted.startswith(name) for name in metrics["why"])
        assert value is not None or explained, dotted


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


@pytest.mark.parametrize("scheme", ["int4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_target_that_does_not_run_here_is_simulated_and_said_so(scheme: str, runs: Any) -> None:
    import torch

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


@pytest.mark.parametrize(
    "config",
    [
        "sft_qwen3",
        pytest.param("sft_phi4_mini", marks=pytest.mark.slow),
        pytest.param("sft_smollm3", marks=pytest.mark.slow),
        pytest.param("sft_gemma3_270m", marks=pytest.mark.slow),
    ],
)
def test_every_shipped_config_runs_offline_on_a_tiny_model_of_its_architecture(config: str, runs: Any) -> None:
    few = ("--train.max-steps=3", "--train.warmup-steps=1", "--train.gradient-accumulation-steps=1")
    small = ("--train.max-length=256", "--data.train-samples=64", "--data.eval-samples=12", f"--run.name={config}")
    run = runs.finish("--config", f"{config}.yaml", "--qat", "int8-int4", "--model.random=tiny", *few, *small)
    metrics = runs.metrics(run)
    assert metrics["train_ship_gap"] == 0.0
    assert metrics["coverage"]["quantized_fraction"] == 1.0
    assert abs(metrics["backend_gap"]) < 1e-4


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
