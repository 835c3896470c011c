"""What a run measures: tasks, cost, and every number of its metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

ARMS = ("base", "base_quantized", "control", "ptq", "tuned", "final")
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
    fewer = ("--qat=int8-int4", *options, "--eval.control=False", "--eval.cost-batches=[]")
    again = runs.here(*fewer, "--run.name=tasks-again", "--train.learning-rate=2e-3", "--data.train-samples=100")
    assert (kept("base"), kept("base_quantized")) == before
    assert runs.metrics(again)["tasks"]["choices"]["base"] == metrics["tasks"]["choices"]["base"]
    other = runs.here(*fewer, "--run.name=tasks-groups", "--quantize.skip=o_proj")
    assert kept("base") == before[0] and kept("base_quantized").items() > before[1].items()
    assert runs.metrics(other)["tasks"]["choices"]["base"] == metrics["tasks"]["choices"]["base"]


def test_a_timing_that_fails_costs_its_section_not_the_report(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from quantize import cost, worker, worker_jobs
    from quantize.run_report import write_report

    def fails(model: Any, batches: Any, compiled: bool) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB\nand more")

    monkeypatch.setattr(cost, "measure_cost", fails)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    job = {"model": str(run / "merged"), "dtype": "float32", "batches": [1], "compiled": True}
    measured = worker_jobs.cost(job, lambda done, total: None)
    assert measured == {"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 TiB"}
    gone = worker_jobs.cost(job | {"model": str(run / "gone")}, lambda done, total: None)
    assert gone["failed"].startswith("OSError: ")

    def dies() -> Any:
        raise RuntimeError("the evaluation process failed with exit code -9; its log is cost.request.log:\nKilled")

    assert worker.run_timings(dies)[0]["failed"].endswith("its log is cost.request.log:")
    gathered = json.loads((run / "gathered.json").read_text()) | {"cost_batches": [1], "cost": [measured, measured]}
    metrics, text = write_report(run, gathered)
    assert metrics["cost"]["ratio"] is None and "Tried to allocate 3 TiB" in metrics["why"]["cost"]
    assert "Not measured: the timing failed (OutOfMemoryError: CUDA out of memory." in text


def test_a_task_that_cannot_be_loaded_ends_the_run_before_training(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.cli import main

    task = tmp_path / "mine.yaml"
    task.write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test\n"
    )
    for name, said in (
        (str(task), "mine cannot be loaded"),
        ("gsm8k", "gsm8k cannot be loaded"),
        ("gsm9", "did you mean"),
    ):
        here = (f"--run.root={runs.root}", f"--run.name=refused-{Path(name).stem}", "--model.backend=peft")
        assert main([*TINY, *here, f'--eval.tasks=["{name}"]']) == 2
        shown = capsys.readouterr()
        assert said in shown.err and "Traceback" not in shown.err
        assert "fit-" not in shown.out


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
