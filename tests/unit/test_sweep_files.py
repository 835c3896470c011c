"""Sweep files: W&B's form, every parameter, and what is said about wrong ones before anything runs."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantize.errors import UserError
from train import sweep_check
from train.cli import main
from train.config import RunConfig
from train.config_loading import HOME, load_config
from train.config_values import annotation_at
from train.sweep_check import check_sweep, options_of
from train.sweep_file import find_sweep, read_sweep
from train.sweep_metrics import kind_of, why_not
from train.sweep_space import Parameter, Space
from train.sweep_values import Malformed, Range, Weighted, read_values

PACKAGED = sorted((HOME / "configs" / "sweeps").glob("*.yaml"))
GOOD: dict[str, Any] = {
    "method": "grid",
    "command": ["train", "--config", "tiny.yaml", "--qat=int8-int4", "${args}"],
    "metric": {"name": "final.loss", "goal": "minimize"},
    "parameters": {"train.learning_rate": {"values": [0.001, 0.002]}},
}


@pytest.fixture(autouse=True)
def no_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and data are looked at elsewhere: reading them takes seconds."""
    monkeypatch.setattr(sweep_check, "missing_inputs", lambda config, bad=(): [])


def write(folder: Path, text: str | None = None, **changes: Any) -> str:
    path = folder / "sweep.yaml"
    given = {key: value for key, value in (GOOD | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False) if text is None else text, encoding="utf-8")
    return str(path)


def refused(name: str, *overrides: str, trials: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_sweep(read_sweep(name), overrides, trials, "cpu")
    return str(caught.value)


class TestPackaged:
    @pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
    @pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
    def test_means_to_w_and_b_what_it_means_here(self, path: Path) -> None:
        """The schema itself is on W&B's server; what its package can read offline are parameters and the command."""
        utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
        from wandb.sdk.sweeps.scheduler.optuna import search_space_from_sweep_config

        found = utils.load_sweep_config(str(path))
        words = utils.create_sweep_command(list(found["command"]))
        assert words[:2] == ["train", "--config"] and words.count("${args}") == 1
        assert utils.make_launch_sweep_entrypoint({"args": ["--qat=int4"]}, words)[1] == ["--qat=int4"]
        ours = read_sweep(path.name)
        theirs = search_space_from_sweep_config(found["parameters"])
        assert {each.key for each in ours.space.parameters} == set(theirs)
        for each in ours.space.parameters:
            if isinstance(each.values, Range):
                assert each.values.probes() == (theirs[each.key].low, theirs[each.key].high)
            else:
                assert list(each.values.values) == list(theirs[each.key].choices)

    @pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
    def test_every_parameter_is_a_key_and_every_trial_a_config(self, path: Path) -> None:
        sweep = read_sweep(path.name)
        for each in sweep.space.parameters:
            annotation_at(RunConfig, each.key.split("."))
        plan = check_sweep(sweep, ["--model.random=tiny"], None, "cpu")
        assert plan.first.track.wandb == "off" and "W&B: off here" in plan.notes[0]
        assert load_config(plan.config, options_of(sweep.words(next(sweep.space.probes())))[1]).track.wandb == "online"
        assert path.read_text(encoding="utf-8").startswith(f"# train --sweep configs/sweeps/{path.name}")

    def test_the_small_one_has_six_trials(self) -> None:
        assert check_sweep(read_sweep("tiny"), (), None, "cpu").trials == 6

    def test_no_such_file_names_the_packaged(self) -> None:
        with pytest.raises(UserError, match=r"--sweep tinny\.yaml: no such file; did you mean tiny\.yaml\? packaged"):
            find_sweep("tinny.yaml")


class TestArguments:
    VALUES = (None, True, False, 3, 0.25, 1e-05, "cosine", [1, 8], ["a", "b"], [])

    def test_are_those_of_w_and_b_s_agent(self) -> None:
        utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
        paths = [(f"train.extra.key{number}",) for number in range(len(self.VALUES))]
        paths += [("lora", "r"), ("lora", "use_rslora"), ("fake_quant", "start")]
        values = [*self.VALUES, 8, True, None]
        space = Space(
            tuple(
                Parameter(path, read_values({"value": v}, grid=False), "")
                for path, v in zip(paths, values, strict=True)
            )
        )
        (point,) = space.points()
        nested: dict[str, Any] = {path[0]: value for path, value in zip(paths, values, strict=True) if len(path) == 1}
        nested |= {"lora": {"r": 8, "use_rslora": True}, "fake_quant": {"start": None}}
        theirs = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in nested.items()}})
        assert space.arguments(point) == theirs["args"]
        command = read_sweep("tiny").command
        for separate, key in ((False, "args"), (True, "args_no_equals")):
            changed = type(command)(("a",), ("b",), separate)
            assert changed.words(space.arguments(point)) == ["a", *theirs[key], "b"]

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("fake_quant.start", None), ("fake_quant.start", 0.25), ("eval.control", False), ("eval.tasks", ["a", "b"]),
            ("eval.cost_batches", [1, 8]), ("eval.cost_batches", []), ("train.max_steps", 8.0), ("lora", None),
            ("train.learning_rate", 1e-05), ("lora.target_modules", ["q_proj", "v_proj"]), ("qat", None),
        ],
    )  # fmt: skip
    def test_arrive_as_they_were(self, key: str, value: Any) -> None:
        space = Space((Parameter(tuple(key.split(".")), read_values({"value": value}, grid=False), ""),))
        for words in (space.arguments({key: value}), [f"--{key}={value}"]):
            found: Any = load_config("tiny.yaml", words)
            for part in key.split("."):
                found = getattr(found, part)
            assert found == value and type(found) is type(int(value) if value == 8.0 else value)


class TestValues:
    @pytest.mark.parametrize(
        ("given", "ends"),
        [
            ({"min": 1, "max": 4}, (1, 4)),
            ({"min": 0.5, "max": 4}, (0.5, 4.0)),
            ({"distribution": "uniform", "min": 1, "max": 4}, (1.0, 4.0)),
            ({"distribution": "q_uniform", "min": 1, "max": 4, "q": 0.5}, (1.0, 4.0)),
            ({"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}, (1e-5, 1e-3)),
            ({"distribution": "log_uniform", "min": -2, "max": 0}, (0.1353352832, 1.0)),
            ({"distribution": "inv_log_uniform", "min": 0, "max": 2}, (0.1353352832, 1.0)),
            ({"distribution": "inv_log_uniform_values", "min": 2, "max": 8}, (2.0, 8.0)),
            ({"distribution": "q_log_uniform_values", "min": 2, "max": 64, "q": 4}, (0, 64)),
            ({"distribution": "normal", "mu": 1, "sigma": 0.1}, (0.7, 1.3)),
            ({"distribution": "q_normal", "mu": 10, "sigma": 1, "q": 2}, (8, 12)),
            ({"distribution": "log_normal", "mu": 0, "sigma": 1}, (0.0497870684, 20.0855369)),
        ],
    )
    def test_ends_of_a_range(self, given: dict[str, Any], ends: tuple[float, float]) -> None:
        values = read_values(given, grid=False)
        assert isinstance(values, Range) and values.probes() == pytest.approx(ends)

    def test_drawn_values_have_the_distribution(self) -> None:
        class Uniform:
            def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
                assert not log
                return random.uniform(low, high)

        random.seed(0)
        weighted = read_values({"values": ["a", "b"], "probabilities": [0.8, 0.2]}, grid=False)
        normal = read_values({"distribution": "normal", "mu": 5, "sigma": 2}, grid=False)
        assert isinstance(weighted, Weighted) and isinstance(normal, Range)
        drawn = [weighted.draw(Uniform(), "x") for _ in range(2000)]  # type: ignore[arg-type]
        assert drawn.count("a") / 2000 == pytest.approx(0.8, abs=0.03)
        numbers = [normal.draw(Uniform(), "x") for _ in range(2000)]  # type: ignore[arg-type]
        assert sum(numbers) / 2000 == pytest.approx(5, abs=0.15)
        assert sum(abs(number - 5) < 2 for number in numbers) / 2000 == pytest.approx(0.683, abs=0.03)

    def test_grids(self) -> None:
        stepped = read_values({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, grid=True)
        whole = read_values({"min": 2, "max": 4}, grid=True)
        space = Space((Parameter(("a",), stepped, ""), Parameter(("b",), whole, "")))
        assert space.size == 12
        assert [tuple(point.values()) for point in space.points()][:4] == [(0, 2), (0, 3), (0, 4), (0.25, 2)]

    @pytest.mark.parametrize(
        ("given", "part"),
        [
            ({}, "expected value, values, min and max"),
            ({"value": 1, "values": [1]}, "values has no meaning with constant"),
            ({"values": []}, "at least one value"),
            ({"values": [1, 1]}, "1 twice"),
            ({"min": 1}, "needs max"),
            ({"min": 3, "max": 2}, "min must be less"),
            ({"min": "1e-3", "max": 2}, "min is '1e-3'; expected a number"),
            ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min above 0"),
            ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}, "q is 0"),
            ({"distribution": "int_uniform", "min": 0.5, "max": 1}, "whole numbers"),
            ({"distribution": "normal", "sigma": 0}, "sigma is 0"),
            ({"distribution": "beta"}, "not offered"),
            ({"distribution": "unifrom", "min": 0, "max": 1}, "unknown distribution 'unifrom'"),
            ({"values": [1, 2], "probabilities": [0.5, 0.4]}, "sum to 0.9"),
            ({"distribution": "log_uniform", "min": 1, "max": 1000}, "exponents of e"),
        ],
    )
    def test_malformed(self, given: dict[str, Any], part: str) -> None:
        with pytest.raises(Malformed, match=part):
            read_values(given, grid=False)


class TestBadFiles:
    def test_everything_is_told_at_once_with_its_line(self, tmp_path: Path) -> None:
        text = """method: gird
metric: {name: final.loss}
run_caps: 3
early_terminate: {type: hyperband, eta: 2}
command: [train, "${args_json}"]
parameters:
  train.learning_rte: {values: [0.1]}
  run.name: {values: [a, b]}
  model.backend: {values: [peft, unsloth]}
  train.weight_decay: {min: 2, max: 1}
"""
        lines = refused(write(tmp_path, text)).splitlines()
        wanted = [
            ("3", "unknown key `run_caps`; did you mean `run_cap`?"), ("1", 'method is "gird"'),
            ("2", "metric.goal is missing"), ("7", "did you mean train.learning_rate?"), ("8", "run.name is given"),
            ("9", "unsloth changes transformers for the whole process"), ("10", "min must be less"),
            ("5", "${args_json} is JSON"), ("4", "early_terminate needs min_iter"),
        ]  # fmt: skip
        assert len(lines) == len(wanted)
        for line, (number, part) in zip(lines, wanted, strict=True):
            assert line.startswith(f"{tmp_path / 'sweep.yaml'}:{number}: ") and part in line

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"command": None}, "command is missing; as command: [train, --config"),
            ({"command": ["train", "${args}"]}, "command names no config"),
            ({"command": ["train", "--config", "tiny.yaml"]}, "command needs ${args} once"),
            ({"command": ["python", "x.py", "${args}"]}, "command does not call `train`"),
            ({"command": ["train", "--config=tiny.yaml", "--x=${args}"]}, "as a word of its own"),
            ({"command": ["train", "--config=tiny.yaml", "--resume=a", "${args}"]}, "--resume has no place"),
            ({"command": ["train", "--config=tiny.yaml", "--dry-run", "${args}"]}, "--dry-run has no place"),
            ({"command": ["train", "--config=tniy.yaml", "${args}"]}, "did you mean tiny.yaml?"),
            ({"metric": None}, "metric is missing"),
            ({"parameters": None}, "parameters is missing"),
            ({"parameters": {"train.max_steps": {"min": 0.5, "max": 2}}}, "a grid needs"),
            ({"parameters": {"train.max_steps": 3}}, "expected value: or values:"),
            ({"parameters": {"train": {"parameters": {"max_steps": {"values": [1, 0]}}}}}, "train.max_steps=0 trains"),
            ({"parameters": {"lora": {"value": None}, "lora.r": {"value": 4}}}, "sets what lora sets"),
            ({"parameters": {"quantize.group_size": {"values": [32, 48]}}}, "48"),
            ({"parameters": {"train.lr_scheduler_type": {"values": ["cosine", "cosin"]}}}, "did you mean cosine?"),
            ({"method": "random"}, "give --trials=20"),
            ({"method": "random", "parameters": {"train.optim": {"values": ["adam"]}}}, "train.optim=adam is unknown"),
            ({"scheduler": {"engine": "optuna"}}, "take method bayes"),
            ({"metric": {"name": "final.los", "goal": "minimize"}}, "did you mean final.loss?"),
            ({"metric": {"name": "final.loss", "goal": "less"}}, 'metric.goal is "less"'),
            ({"run_cap": 0}, "run_cap is 0"),
        ],
    )  # fmt: skip
    def test_one_thing(self, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
        assert part in refused(write(tmp_path, **changes))

    def test_both_ends_of_a_range_are_checked(self, tmp_path: Path) -> None:
        ranges = {"lora.lora_dropout": {"min": 0.0, "max": 1.5}, "train.max_steps": {"min": 0, "max": 5}}
        text = refused(write(tmp_path, method="bayes", parameters=ranges), trials=3)
        assert "--lora.lora_dropout=1.5: expected a number >= 0 and < 1" in text and "train.max_steps=0" in text

    def test_yaml_that_means_two_things(self, tmp_path: Path) -> None:
        text = yaml.safe_dump(GOOD | {"method": "random", "run_cap": 2}).replace("- 0.001", "- 1e-3")
        read_sweep(write(tmp_path, text))  # on a command line the same
        text += "  train.lr_scheduler_type: {values: [off, cosine]}\n  lora.lora_dropout: {min: 1e-3, max: 0.1}\n"
        text = text.replace("run_cap: 2\n", "").replace("parameters:", "run_cap: 2\nparameters:")
        found = refused(write(tmp_path, text))
        assert 'W&B reads false where `train` reads "off"; quote it' in found
        assert 'W&B reads "1e-3" where `train` reads 0.001; write 1.0e-03' in found

    def test_malformed_yaml_and_an_empty_file(self, tmp_path: Path) -> None:
        assert "sweep.yaml:3: malformed YAML" in refused(write(tmp_path, "method: grid\nmetric: [\n  a: : b"))
        assert "expected `method:`, `metric:`" in refused(write(tmp_path, ""))

    def test_a_config(self) -> None:
        assert "is a config, no sweep; as train --config" in refused(str(HOME / "configs" / "tiny.yaml"))

    def test_options_that_collide(self, tmp_path: Path) -> None:
        name = write(tmp_path)
        assert "is a parameter of the sweep" in refused(name, "--train.learning-rate=1")
        assert "each trial has a name of its own" in refused(name, "--run.name=x")
        assert "unknown option --train.max_stepz" in refused(name, "--train.max_stepz=4")

    def test_a_metric_that_only_some_trials_have(self, tmp_path: Path) -> None:
        command = ["train", "--config", "tiny.yaml", "${args}"]
        name = write(tmp_path, command=command, parameters={"qat": {"values": ["int8-int4", None]}})
        assert "final.loss is not reported in trials with qat=None" in refused(name)


class TestMetrics:
    @pytest.mark.parametrize(
        ("metric", "options", "reason"),
        [
            ("final.loss", [], None),
            ("tuned/loss", [], None),
            ("recovered", [], None),
            ("comparisons.final_vs_ptq.loss.value", [], None),
            ("cost.ratio.decode_ms.8", [], None),
            ("size.bits_per_weight", [], None),
            ("ptq.loss", ["--eval.control=false"], "eval.control is false"),
            ("recovered", ["--eval.control=false"], "eval.control is false"),
            ("cost.ratio.decode_ms.8", ["--eval.cost-batches=[]"], "eval.cost_batches is empty"),
            ("cost.ratio.decode_ms.8", ["--qat=fp8"], "does not run on this machine"),
            ("final.loss", ["--qat=fp8"], None),
            ("final.loss", ["--qat=None"], "neither qat nor quantize.scheme is set"),
            ("tuned.loss", ["--qat=None"], None),
            ("scheme", [], "it is no number"),
            ("final", [], "no such key"),
            ("tasks.choices.final.value", [], "eval.tasks is empty"),
            ("tasks.choices.final.value", ["--eval.tasks=examples/tasks/choices.yaml"], None),
            ("tasks.gsm8k.final.value", ["--eval.tasks=examples/tasks/choices.yaml"], "the run's tasks are choices"),
            ("tasks.choices.metric", ["--eval.tasks=examples/tasks/choices.yaml"], "it is no number"),
            ("tasks_mean.final.value", ["--eval.tasks=examples/tasks/choices.yaml"], "two tasks"),
        ],
    )  # fmt: skip
    def test_known_before_a_run(self, metric: str, options: list[str], reason: str | None) -> None:
        found = why_not(metric, kind_of(load_config("tiny.yaml", ["--qat=int8-int4", *options]), "cpu"))
        assert (found is None) if reason is None else (found is not None and reason in found)


class TestCommandLine:
    def test_dry_run_lists_the_trials(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--sweep", "tiny", "--dry-run", "--run.root=elsewhere"]) == 0
        text = capsys.readouterr().out
        assert "sweep tiny: grid, 6 trials" in text and "state in elsewhere/sweeps/tiny" in text
        assert "  5: --train.learning_rate=0.02 --fake_quant.start=0.5" in text and "disk of all 6 trials" in text

    @pytest.mark.parametrize(
        ("words", "part"),
        [
            (["--sweep=tiny", "--config=tiny"], "--sweep takes its config from"),
            (["--trials=3", "--config=tiny"], "--trials is the number of trials of --sweep"),
            (["--sweep=tiny", "--trials=0"], "--trials=0: expected a whole number >= 1"),
            (["--sweep"], "--sweep needs a value, as --sweep tiny.yaml"),
        ],
    )
    def test_misplaced_options(self, words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words) == 2
        assert part in capsys.readouterr().err

    def test_help_and_reading_need_neither_torch_nor_optuna(self) -> None:
        code = (
            "import sys\nfrom train.cli import main\nassert main(['--help']) == 0\n"
            "from train.sweep_file import read_sweep\nread_sweep('tiny')\n"
            "assert not {'torch', 'optuna', 'sqlalchemy', 'wandb'} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "--sweep" in done.stdout and "--trials" in done.stdout
