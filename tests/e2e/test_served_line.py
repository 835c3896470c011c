"""The line with its tasks in vLLM: what stands in for it answers as transformers does, so the results must be those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import make_environment

from quantize.serving import engine
from quantize.tasks import load_rows
from quantize.worker_jobs import KINDS
from train import stage_log

WORDS = (
    "--data.train-samples=16", "--data.eval-samples=4", "--train.max-steps=1", "--eval.cost-batches=[]",
    "--eval.control=false", "--eval.tasks=examples/tasks/choices.yaml,examples/tasks/answers.yaml", "--eval.limit=2",
)  # fmt: skip


def _in_this_process(jobs: list[dict[str, Any]], *_: Any, **__: Any) -> list[Any]:
    """What the fresh process does, here, where lm-eval is imported already."""
    return json.loads(json.dumps([KINDS[job["kind"]](job, lambda done, total: None) for job in jobs]))


def _kept_results(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob(".cache/baseline/base-*/*/base.tasks.parquet")}


@pytest.mark.slow
def test_tasks_of_a_run_are_served_and_never_taken_from_the_other_engine(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_log, "run_jobs", _in_this_process)
    plain = runs.here(*WORDS, "--run.name=engine-plain")
    kept = _kept_results(runs.root)  # of other tests' runs, too
    monkeypatch.setenv("ONGRID_VLLM", str(make_environment(tmp_path / "env")))
    monkeypatch.setattr(engine, "has_nvidia_driver", lambda: True)
    served = runs.here(*WORDS, "--eval.engine=vllm", "--run.name=engine-vllm")
    for arm in ("base", "tuned"):
        one, other = (load_rows(run / "eval" / f"{arm}.tasks.parquet") for run in (plain, served))
        assert [(row.task, row.doc_id, row.prompt, row.value) for row in one] == [
            (row.task, row.doc_id, row.prompt, row.value) for row in other
        ]
    assert (served / "eval" / "tuned.tasks.vllm.log").read_text().count(" serve ") == 1
    assert len(_kept_results(runs.root) - kept) == 1, "results of one engine were taken for those of the other"
    assert "run by lm-eval, the models served by vLLM 0.23.0" in (served / "report.md").read_text()
    assert "| vllm | 0.23.0 |" in (served / "report.md").read_text()
    assert "vLLM" not in (plain / "report.md").read_text()
    gathered = json.loads((served / "gathered.json").read_text())
    assert gathered["engine"]["packages"] == {"vllm": "0.23.0", "torchao": "0.18.0"}
