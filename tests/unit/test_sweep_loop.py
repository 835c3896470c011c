"""The trials of a sweep, one after the other, with a stand-in for the pipeline: order, failures, stops, going on."""

from __future__ import annotations

import errno
import gc
import importlib.util
import json
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna")

from quantize.errors import UserError
from train import sweep_check
from train.cli import main
from train.events import Event


class Died(BaseException):
    """As a kill: nothing is written any more."""


class Pipeline:
    """What was run, and what a run of these settings does."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []
        self.act: Callable[[Any], Any] = lambda config: None

    def run(self, config: Any, *, argv: Any, sinks: Any, ready: Any) -> Any:
        self.seen.append((config.run.name, config.train.learning_rate, config.fake_quant.start))
        folder = Path(config.run.root) / config.run.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.resolved.json").write_text(json.dumps(config.model_dump(mode="json")))
        assert argv[:2] == ["--config", "tiny.yaml"] and argv[-1] == f"--run.name={config.run.name}"
        for step in range(1, 9):
            data = {"arm": "tuned", "step": step, "loss": config.train.learning_rate + 1 / step}
            for sink in sinks:
                sink.emit(Event("step", data))
        loss = self.act(config)
        loss = config.train.learning_rate if loss is None else loss
        metrics = {"final": {"loss": None if loss != loss else loss}, "why": {"final": "it fell over"}}
        return types.SimpleNamespace(path=folder, metrics=metrics, report="")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    made = Pipeline()
    module = types.ModuleType("train.pipeline")
    module.run = made.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "train.pipeline", module)
    monkeypatch.setattr(sweep_check, "missing_inputs", lambda config, bad=(): [])
    monkeypatch.setattr(sweep_check, "why_not", lambda *args: None)  # both have tests of their own
    monkeypatch.setattr(gc, "collect", lambda: 0)
    return made


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., int]:
    """Runs a sweep of three learning rates, changed as asked."""

    def start(*options: str, **changes: Any) -> int:
        given = {
            "name": "s",
            "method": "grid",
            "command": ["train", "--config", "tiny.yaml", "--qat=int8-int4", "${args}"],
            "metric": {"name": "final.loss", "goal": "minimize"},
            "parameters": {"train.learning_rate": {"values": [0.003, 0.001, 0.002]}},
            **changes,
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
        return main(["--sweep", str(path), f"--run.root={tmp_path / 'runs'}", *options])

    return start


def results(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "runs" / "sweeps" / "s" / "sweep.json").read_text())  # type: ignore[no-any-return]


def test_a_grid_is_run_once_and_ranked(
    sweep: Callable[..., int], pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    assert [name for name, *_ in pipeline.seen] == ["s-000", "s-001", "s-002"]
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.endswith("complete")]
    assert [row[:3] for row in rows] == [["1", "0.001", "0.001"], ["2", "0.002", "0.002"], ["0", "0.003", "0.003"]]
    found = results(tmp_path)
    assert found["best"]["number"] == 1 and found["best"]["parameters"] == {"train.learning_rate": 0.001}
    assert "train --config tiny.yaml --qat=int8-int4 --train.learning_rate=0.001" in found["best"]["command"]
    assert found["compare"] == f"quantize compare {tmp_path}/runs/s-001 {tmp_path}/runs/s-002"
    assert found["best"]["command"] in (tmp_path / "runs/sweeps/s/sweep.md").read_text()
    assert sweep() == 0 and len(pipeline.seen) == 3, "nothing is left to do"
    assert "3 have ended already" in capsys.readouterr().out
    assert sweep(parameters={"train.learning_rate": {"values": [0.003, 0.001]}}) == 2
    assert "holds a sweep with other settings (parameters)" in capsys.readouterr().err
    assert sweep("--train.max-steps=4") == 2
    assert "(train.max_steps)" in capsys.readouterr().err


def test_failures_are_kept_and_the_sweep_goes_on(
    sweep: Callable[..., int], pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(config: Any) -> float | None:
        if config.train.learning_rate == 0.003:
            raise UserError("the loss is nan", "lower it")
        if config.train.learning_rate == 0.001:
            raise RuntimeError("out of memory\nat line 3")
        return float("nan") if config.train.learning_rate == 0.004 else None

    pipeline.act = act
    values = {"train.learning_rate": {"values": [0.003, 0.001, 0.002, 0.004]}}
    assert sweep(parameters=values) == 0
    trials = results(tmp_path)["trials"]
    assert [trial["state"] for trial in trials] == ["failed", "failed", "complete", "failed"]
    assert trials[0]["error"] == "the loss is nan; lower it"
    assert trials[1]["error"].startswith("RuntimeError: out of memory; the traceback: train --resume")
    assert trials[3]["error"] == "final.loss has no number: it fell over"
    assert "failed: the loss is nan" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(UserError("no"), 2), (RuntimeError("no"), 1)])
def test_all_failed(sweep: Callable[..., int], pipeline: Pipeline, error: Exception, code: int) -> None:
    def act(config: Any) -> None:
        raise error

    pipeline.act = act
    assert sweep(parameters={"train.learning_rate": {"values": [0.001]}}) == code
    assert len(pipeline.seen) == 1


def test_a_full_disk_ends_the_sweep_and_the_trial_is_taken_up(
    sweep: Callable[..., int], pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(config: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    pipeline.act = act
    assert sweep() == 2
    assert "free some space, then continue with: train --sweep" in capsys.readouterr().err
    pipeline.act = lambda config: None
    assert sweep() == 0
    assert [name for name, *_ in pipeline.seen] == ["s-000", "s-000", "s-001", "s-002"]


@pytest.mark.parametrize("method", ["grid", "bayes"])
def test_broken_off_anywhere_it_goes_on_with_the_same_values(
    sweep: Callable[..., int], pipeline: Pipeline, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"train.learning_rate": {"min": 0.001, "max": 0.1}, "fake_quant.start": {"values": [0, 0.5, None]}}
    if method == "grid":
        space["train.learning_rate"] = {"values": [0.01, 0.02]}
    asked: dict[str, Any] = {"method": method, "parameters": space, "run_cap": 5}
    unbroken = [[rate, start] for rate in (0.01, 0.02) for start in (0, 0.5, None)][:5]
    if method == "bayes":
        assert sweep(name="whole", **asked) == 0
        unbroken = [values for _, *values in pipeline.seen]
    pipeline.seen.clear()

    def stopped(config: Any) -> None:
        if config.run.name == "s-001":
            os.kill(os.getpid(), signal.SIGTERM)
        if config.run.name == "s-003":
            raise Died

    pipeline.act = stopped
    before = signal.getsignal(signal.SIGTERM)
    assert sweep(**asked) == 143
    assert "stopped; continue with: train --sweep" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert [trial["number"] for trial in results(tmp_path)["trials"]] == [0]
    pipeline.act = lambda config: stopped(config) if config.run.name == "s-003" else None
    with pytest.raises(Died):
        sweep(**asked)
    assert len(results(tmp_path)["trials"]) == 3
    pipeline.act = lambda config: None
    assert sweep(**asked) == 0
    names = [name for name, *_ in pipeline.seen]
    assert names == ["s-000", "s-001", "s-001", "s-002", "s-003", "s-003", "s-004"]
    assert list({name: values for name, *values in pipeline.seen}.values()) == unbroken
    assert len(results(tmp_path)["trials"]) == 5


def test_more_trials_and_values_that_come_again(
    sweep: Callable[..., int], pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"fake_quant.start": {"values": [0, 0.5]}}
    asked: dict[str, Any] = {"method": "random", "parameters": values, "run_cap": 1}
    assert sweep(**asked) == 0
    assert len(pipeline.seen) == 1
    assert sweep("--trials=20", **asked) == 0
    assert len(pipeline.seen) == 2, "two points are all that there are"
    trials = results(tmp_path)["trials"]
    again = [trial for trial in trials if trial["same_as"] is not None]
    assert len(trials) == 2 + len(again) and all(trial["value"] == 0.005 for trial in trials)


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_early_stop_by_the_training_loss(
    sweep: Callable[..., int], pipeline: Pipeline, tmp_path: Path, goal: str
) -> None:
    """The training loss, which falls, is compared; a metric that is to grow turns nothing round."""
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    values = {"train.learning_rate": {"values": [0.001, 0.5, 0.0005]}}
    metric = {"name": "final.loss", "goal": goal}
    assert sweep(parameters=values, early_terminate=early, metric=metric) == 0
    states = [trial["state"] for trial in results(tmp_path)["trials"]]
    assert states == ["complete", "stopped early", "complete"]


def test_what_stands_in_the_way(
    sweep: Callable[..., int], pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    other = tmp_path / "runs" / "s-000"
    other.mkdir(parents=True)
    (other / "config.resolved.json").write_text("{}")
    assert sweep() == 2
    assert "s-000 holds a run with other settings; give the sweep another `name:`" in capsys.readouterr().err
    (tmp_path / "runs" / "sweeps" / "s" / "study.db").write_bytes(b"no database" * 100)
    assert sweep() == 2
    assert "study.db cannot be read" in capsys.readouterr().err
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
    assert sweep() == 2
    assert "optuna is not installed; pip install 'ongrid[sweep]'" in capsys.readouterr().err
    assert pipeline.seen == []


def test_nested_parameters_as_the_agent_gives_them(
    sweep: Callable[..., int], pipeline: Pipeline, tmp_path: Path
) -> None:
    nested = {"train": {"parameters": {"learning_rate": {"values": [0.01, 0.02]}, "max_steps": {"value": 4.0}}}}
    assert sweep(parameters=nested) == 0
    assert [rate for _, rate, _ in pipeline.seen] == [0.01, 0.02]
    assert "--train={'learning_rate': 0.01, 'max_steps': 4.0}" in results(tmp_path)["best"]["command"].replace(
        "'\"'\"'", "'"
    )
