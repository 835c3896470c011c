"""dpo and grpo through the whole line, in this process: what ships is what was trained, and what is measured of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from quantize.compare import compare_runs
from quantize.task_rows import load_rows, own_rows_path

ARMS = ("base", "base_quantized", "control", "ptq", "tuned", "final")
PAIRS = (
    "--train.method=dpo",
    "--data.train=examples/data/preferences_train.jsonl",
    "--data.eval=examples/data/preferences_eval.jsonl",
)
REWARDS = (
    "--train.method=grpo",
    "--grpo.num_generations=4",
    "--grpo.max_completion_length=8",
    "--grpo.eval_samples=12",
    "--eval.control=False",
)
SMALL = ("--qat=int8-int4", "--eval.cost-batches=[]", "--data.train-samples=48", "--data.eval-samples=16")


@pytest.fixture(scope="module")
def preferred(runs: Any) -> Path:
    return runs.here(*SMALL, *PAIRS, "--train.max-steps=4", "--run.name=preferred")


def test_preferences_are_measured_on_every_arm(preferred: Path, runs: Any) -> None:
    metrics = runs.metrics(preferred)
    assert metrics["train_ship_gap"] == 0.0 and abs(metrics["backend_gap"]) < 1e-4
    (name, task), *others = metrics["tasks"].items()
    assert name == "preferences" and not others and task["share"] and task["n_samples"] == 16
    assert all(task[arm]["value"] is not None for arm in ARMS)
    rows = {arm: load_rows(own_rows_path(preferred / "eval" / f"{arm}.parquet")) for arm in ARMS}
    for arm in ARMS:
        assert sum(row.value for row in rows[arm]) / 16 == task[arm]["value"]
        assert [row.doc_hash for row in rows[arm]] == [row.doc_hash for row in rows["base"]]
    report = (preferred / "report.md").read_text()
    assert "| preferences | preferred | 16 |" in report and "run by lm-eval" not in report
    assert "| dpo.beta | 0.1 |" in report and "grpo.beta" not in report


def test_the_untouched_model_is_kept_and_runs_are_compared(preferred: Path, runs: Any, tmp_path: Path) -> None:
    shared = runs.root / ".cache" / "baseline"
    before = {path: path.stat().st_mtime_ns for path in shared.glob("base*/*.method.parquet")}
    options = ("--train.max-steps=4", "--dpo.beta=0.5", "--eval.control=False", "--run.name=preferred-more")
    other = runs.here(*SMALL, *PAIRS, *options)
    assert {path: path.stat().st_mtime_ns for path in shared.glob("base*/*.method.parquet")} == before
    assert (
        runs.metrics(other)["tasks"]["preferences"]["base"] == runs.metrics(preferred)["tasks"]["preferences"]["base"]
    )
    assert runs.metrics(other)["tuned"]["loss"] != runs.metrics(preferred)["tuned"]["loss"]
    compare_runs([preferred.name, other.name], str(runs.root), tmp_path / "comparison")
    assert "preferences" in (tmp_path / "comparison" / "report.md").read_text()


def test_rewards_are_learned_and_measured(runs: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def even(completions, task, answer, **columns):\n"
        "    assert len(task) == len(answer) == len(completions)\n"
        "    return [float(sum(map(ord, c[0]['content'])) % 2 == 0) for c in completions]\n"
    )
    options = (*SMALL, *REWARDS, f"--grpo.rewards=[{own}:even]", "--train.max-steps=6", "--run.name=rewarded")
    run = runs.here(*options)
    metrics = runs.metrics(run)
    assert metrics["train_ship_gap"] == 0.0
    task = metrics["tasks"]["rewards"]
    assert task["metric"] == "reward" and task["n_samples"] == 12
    assert all(task[arm]["value"] is not None for arm in ("base", "base_quantized", "tuned", "final"))
    rows = load_rows(own_rows_path(run / "eval" / "final.parquet"))
    assert all(row.value == float(sum(map(ord, row.response)) % 2 == 0) for row in rows)
    trained = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert runs.here(*options) == run
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == trained  # all was done

    own.write_text(own.read_text().replace("== 0", "== 1"))
    runs.here(*options)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() != trained  # another reward, another training


def test_rewards_are_prompted_in_the_template_that_is_configured(runs: Any, tmp_path: Path) -> None:
    """A model without a template of its own too; what is trained is prompted as what is measured."""
    from train.pipeline import resume

    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}.{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "prompts.py").write_text(
        "import scipy.stats\nimport sklearn\n"
        "def seen(prompts, completions, **columns):\n    return [float(len(prompts[0]) == 1) for _ in completions]\n"
    )
    options = (f"--data.chat_template={tmp_path}/plain.jinja", f"--grpo.rewards=[{tmp_path}/prompts.py:seen]")
    run = runs.here(*SMALL, *REWARDS, *options, "--train.max-steps=2", "--run.name=templated")
    rows = load_rows(own_rows_path(run / "eval" / "final.parquet"))
    assert all(
        row.prompt.startswith("<user>") and row.prompt.endswith("<assistant>") and row.value == 1.0 for row in rows
    )
    steps = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    tokens = [step["num_tokens"] for step in steps if step["kind"] == "step"]
    longest = max(len(row.prompt) for row in rows)  # a byte is a token
    assert 0 < tokens[0] <= 4 * (longest + 60)
    lost = own_rows_path(run / "eval" / "final.parquet")
    before = lost.read_bytes()
    lost.unlink()
    (run / "report.md").unlink()
    resume(str(run))
    assert len(load_rows(lost)) == len(rows) and before


def test_where_the_target_cannot_run_the_simulation_is_rated(runs: Any) -> None:
    options = ("--qat=fp8", *SMALL[1:], *PAIRS, "--eval.control=False", "--train.max-steps=2", "--run.name=simulated")
    metrics = runs.metrics(runs.here(*options))
    assert metrics["simulated"] and metrics["tasks"]["preferences"]["final"]["value"] is not None


def test_the_command_line_says_what_is_wrong(runs: Any) -> None:
    done = runs.train(*TINY, "--train.method=grpo", "--grpo.rewards=[nowhere.py:f]", "--grpo.num_generations=3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for said in ("needs model.backend=peft", "do not fit a step of 4 rows", "there is no file nowhere.py"):
        assert said in done.stderr, done.stderr
    done = runs.train(*TINY, "--train.method=dpo")
    assert done.returncode == 2 and "train.method=dpo needs the columns chosen, rejected and prompt" in done.stderr
