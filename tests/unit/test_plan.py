"""`train --dry-run`: which steps it tells of, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train import plan as plan_module
from train.config_loading import HOME, load_config
from train.plan import estimate
from train.plan_steps import Step


def _obstacles(*words: str, config: str = "tiny.yaml") -> str:
    return "\n".join(estimate(load_config(config, words)).obstacles)


def _steps(*words: str, config: str = "tiny.yaml") -> dict[str, Step]:
    return {step.name: step for step in estimate(load_config(config, words)).steps}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "has_nvidia_driver", lambda: False)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("nope.yaml", "there is no file nope.yaml"),
        ("gsm9k", "lm-eval has no task gsm9k; did you mean gsm8k"),
        ("gsm8k,gsm8k", "gsm8k is named twice"),
    ],
)
def test_tasks_that_are_none_are_obstacles(tasks: str, said: str) -> None:
    assert said in _obstacles(f"--eval.tasks={tasks}")


def test_known_tasks_are_no_obstacles() -> None:
    assert _obstacles("--eval.tasks=gsm8k,mmlu,release13", "--qat=int8-int4").count("named twice") == 1
    assert not _obstacles("--eval.tasks=examples/tasks/choices.yaml,ai2_arc,hellaswag")


def test_a_missing_lm_eval_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    assert "lm-eval is not installed; `make setup` installs it" in _obstacles("--eval.tasks=gsm8k")


@pytest.mark.parametrize("config", ["tiny.yaml", "quickstart.yaml"])  # a shape, and the header of a GGUF
def test_an_entry_of_skip_that_fits_no_layer_is_an_obstacle(config: str) -> None:
    text = _obstacles("--qat=int8-int4", "--quantize.skip=nolayer,down_proj,model.layers.99", config=config)
    assert "quantize.skip: 'nolayer', 'model.layers.99' fits no linear layer" in text
    assert "q_proj" in text and "the first is model.layers.0." in text


@pytest.mark.parametrize(
    "entry", ["lm_head", "o_proj", "model.layers.1", "*.self_attn", "model.language_model.layers.0"]
)
def test_an_entry_of_skip_that_may_fit_is_no_obstacle(entry: str) -> None:
    assert not _obstacles("--qat=int8-int4", f"--quantize.skip={entry}")


_SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96,
}  # fmt: skip


def _plan_of(settings: dict[str, Any], folder: Path, *words: str) -> tuple[str, str]:
    """(obstacles, notes) for a model with that config.json and an entry of skip that a Llama has no layer for."""
    (folder / "config.json").write_text(json.dumps(settings))
    words = ("--qat=int8-int4", f"--model.id={folder}", "--quantize.skip=fc1", *words)
    plan = estimate(load_config("quickstart.yaml", words))
    return "\n".join(plan.obstacles), "\n".join(plan.notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "phi", **_SHAPE},
        {"model_type": "gpt_neox", **_SHAPE},
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **_SHAPE}},
        {"model_type": "qwen3_5_text", **_SHAPE},
        _SHAPE,
    ],
)
def test_skip_is_only_noted_where_the_layers_names_are_guessed(settings: dict[str, Any], tmp_path: Path) -> None:
    obstacles, notes = _plan_of(settings, tmp_path)
    assert "quantize.skip" not in obstacles
    assert "quantize.skip: 'fc1' fits none of the layers that a Llama would have; if this model has none" in notes


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "smollm3", "phi3"])
def test_skip_is_refused_where_the_layers_names_are_known(model_type: str, tmp_path: Path) -> None:
    obstacles, notes = _plan_of({"model_type": model_type, **_SHAPE}, tmp_path)
    assert "quantize.skip: 'fc1' fits no linear layer" in obstacles and "quantize.skip" not in notes
    assert ("qkv_proj, o_proj, gate_up_proj" in obstacles) is (model_type == "phi3")


def test_skip_is_only_noted_where_code_of_the_model_s_own_may_run(tmp_path: Path) -> None:
    words = ["--model.trust-remote-code=true", "--model.backend=peft"]
    obstacles, notes = _plan_of({"model_type": "llama", **_SHAPE}, tmp_path, *words)
    assert "quantize.skip" not in obstacles and "quantize.skip: 'fc1'" in notes


@pytest.mark.parametrize(("architecture", "attention"), [("phi3", "attn_qkv"), ("gptneox", "attn_q")])
def test_skip_is_only_noted_for_a_gguf_of_other_layers(architecture: str, attention: str, tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", architecture)
    for name in ("token_embd.weight", f"blk.0.{attention}.weight", "blk.0.ffn_down.weight"):
        writer.add_tensor(name, np.zeros((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = ["--qat=int8-int4", f"--model.id={tmp_path / 'model.gguf'}", "--quantize.skip=qkv_proj"]
    plan = estimate(load_config("quickstart.yaml", words))
    assert not any("quantize.skip" in line for line in plan.obstacles)
    assert any("quantize.skip: 'qkv_proj'" in line for line in plan.notes)


def test_skip_is_not_judged_where_experts_have_other_names() -> None:
    experts = {"--model.architecture": "qwen3_moe", "--model.shape.num_experts": "4"}
    words = [f"{key}={value}" for key, value in experts.items()]
    assert "nolayer" not in _obstacles("--qat=int8-int4", "--quantize.skip=nolayer", *words)


def test_the_steps_are_those_of_the_pipeline_in_its_order() -> None:
    steps = _steps("--qat=int8-int4", "--eval.control=true", "--eval.tasks=gsm8k", "--eval.limit=40")
    order = list(steps)
    assert order == [
        "model", "data", "tasks", "baseline", "control", "prepare QAT", "fit", "merge", "evaluate tuned", "quantize",
        "evaluate final", "cost", "benchmarks", "report",
    ]  # fmt: skip
    assert not any(step.skipped for step in steps.values())
    assert steps["tasks"].text == "load gsm8k, with their data"
    assert steps["benchmarks"].text.startswith("gsm8k: the first 40 samples of each task, on 6 arms (base, control,")
    assert steps["cost"].text.startswith("decode for 1, 8 sequences")


@pytest.mark.parametrize(
    ("words", "arms"),
    [
        (["--qat=int8-int4", "--eval.control=false"], "4 arms (base, tuned, base_quantized, final)"),
        (["--quantize.scheme=int8-int4", "--eval.control=false"], "4 arms (base, tuned, base_quantized, final)"),
        (["--eval.control=false"], "2 arms (base, tuned)"),
    ],
)
def test_benchmarks_run_on_the_arms_that_there_are(words: list[str], arms: str) -> None:
    text = _steps(*words, "--eval.tasks=gsm8k")["benchmarks"].text
    assert text == f"gsm8k: all samples of each task, on {arms}"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--qat=int8-int4", "--eval.cost_batches=[]"], "eval.cost_batches is empty"),
        (["--qat=fp8"], "needs cuda"),
        ([], "neither qat nor quantize.scheme is set"),
    ],
)
def test_why_no_cost_is_measured(words: list[str], why: str) -> None:
    assert why in (_steps(*words)["cost"].skipped or "")


def test_no_tasks_no_benchmarks() -> None:
    steps = _steps("--qat=int8-int4")
    assert steps["tasks"].skipped == steps["benchmarks"].skipped == "eval.tasks is empty"


def test_what_may_be_float32_is_not_called_16_bit() -> None:
    steps: Any = _steps("--qat=int8-int4").values()
    assert not any("16 bit" in step.text or "16-bit" in step.text for step in steps)


def test_looking_up_lm_eval_s_tasks_imports_no_torch() -> None:
    code = (
        "import sys\nfrom train.cli import main\n"
        "code = main(['--config', 'tiny.yaml', '--dry-run', '--eval.tasks=gsm8k,examples/tasks/choices.yaml'])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
