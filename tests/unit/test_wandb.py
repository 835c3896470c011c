"""W&B offline, for real: what its own files hold afterwards. No account, no network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("wandb")

from wandb_files import log_entries

from quantize.metrics import build_metrics
from quantize.plots import draw_plots
from quantize.tasks import Row
from train.config import RunConfig
from train.events import Event
from train.rundir import RunDir
from train.wandb_sink import WandbSink

CONFIG = RunConfig.model_validate(
    {"qat": "int4", "model": {"id": "m"}, "data": {"train": "d"}, "track": {"wandb": "offline", "tags": ["t"]}}
)
NOTHING: dict[str, Any] = {
    "arms": {}, "why": {}, "train_ship_gap": None, "backend_gap": None, "reference": None, "size": {}, "coverage": {},
    "scheme": None, "target": None, "dtype": "float32", "simulated": False,
}  # fmt: skip


@dataclass(frozen=True)
class FakeScores:
    nll: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    kl: None = None
    top1: None = None


def _scores(loss: float, right: int) -> FakeScores:
    return FakeScores(loss * np.ones(8) + np.linspace(-0.1, 0.1, 8), np.ones(8, dtype=np.int64), np.arange(8) < right)


def _rows(right: int) -> list[Row]:
    common: dict[str, Any] = {"name": "gsm8k", "task": "gsm8k", "doc_hash": "h", "metric": "exact_match", "weight": 1.0}
    texts = {"higher_is_better": True, "prompt": "p", "target": "t", "response": "r"}
    return [Row(doc_id=number, value=float(number < right), **common, **texts) for number in range(8)]


METRICS: dict[str, Any] = build_metrics(
    **{
        **NOTHING,
        "arms": {"base": _scores(2.0, 2), "final": _scores(1.5, 4)},
        "why": {"control": "eval.control is false"},
        "size": {"final_mib": 10.0},
        "task_rows": {"base": _rows(2), "final": _rows(4)},
    }
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("WANDB_SILENT", "true")
    made = RunDir.create(str(tmp_path), "run", "", CONFIG.model_dump(mode="json"))
    for name in ("metrics.json", "report.md", "report.html"):
        made.write_text(name, "x")
    (made.path / "plots").mkdir()
    (plot,) = draw_plots(build_metrics(**NOTHING), {"tuned": [(1, 2.0), (2, 1.0)]})
    (made.path / "plots" / "loss.png").write_bytes(plot.png)
    return made


def _records(run: RunDir) -> Iterator[Any]:
    """What W&B wrote for its server."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        records: list[Any] = []
        deadline = time.monotonic() + 30
        while not any(record.HasField("exit") for record in records):  # W&B's own process may still be writing
            assert time.monotonic() < deadline
            records = [wandb_internal_pb2.Record.FromString(data) for data in log_entries(path.read_bytes())]
        yield from records


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _write(run: RunDir, *events: Event) -> WandbSink:
    sink = WandbSink(CONFIG, run)
    run.update_manifest(wandb_run_id=sink.run_id)
    for event in events:
        sink.emit(event)
    sink.close()
    return sink


def test_config_steps_summary_table_and_report_arrive(run: RunDir) -> None:
    step = Event("step", {"arm": "tuned", "step": 3, "loss": 1.25, "learning_rate": 1e-3})
    engine = Event("engine", {"tasks": "vLLM 0.23.0"})
    _write(run, engine, step, Event("metrics", METRICS), Event("report", {"text": "..."}))
    records = list(_records(run))
    (started,) = [record.run for record in records if record.HasField("run")][:1]
    config = _values(started.config.update)
    assert config["qat"] == "int4" and config["train"]["max_steps"] == -1
    assert list(started.tags) == ["t"] and started.project == "ongrid"
    logged: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in records:
        logged |= _values(record.history.item)
        summary |= _values(record.summary.update)
    assert logged["tuned/loss"] == 1.25 and logged["tuned/step"] == 3
    assert logged["arms._type"] == "table-file" and logged["arms.nrows"] == 2
    table = json.loads(next(run.path.rglob("arms_*.table.json")).read_text())
    of_final = dict(zip(table["columns"], table["data"][1], strict=True))
    assert of_final["arm"] == "final" and of_final["loss_vs_base"] == pytest.approx(-0.5) and of_final["mib"] == 10.0
    assert of_final["accuracy_vs_base_low"] < 0.25 < of_final["accuracy_vs_base_high"]
    assert logged["tasks._type"] == "table-file" and logged["tasks.ncols"] == 14
    assert logged["plots/loss._type"] == "image-file" and logged["plots/loss.width"] > 400
    assert summary["tasks_engine"] == "vLLM 0.23.0"
    assert summary["final.loss"] == 1.5 and summary["size.final_mib"] == 10.0
    assert "control.loss" not in summary
    artifacts = [record.request.log_artifact.artifact for record in records if record.HasField("request")]
    artifacts += [record.artifact for record in records if record.HasField("artifact")]
    reports = [artifact for artifact in artifacts if artifact.type == "report"]
    assert {entry.path for entry in reports[0].manifest.contents} == {"metrics.json", "report.md", "report.html"}


def test_a_resumed_run_goes_on_under_its_id(run: RunDir) -> None:
    first = _write(run, Event("step", {"arm": "tuned", "step": 1, "loss": 2.0}))
    again = _write(run, Event("step", {"arm": "tuned", "step": 2, "loss": 1.0}))
    assert first.run_id == again.run_id
    assert {record.run.run_id for record in _records(run) if record.HasField("run")} == {first.run_id}


@pytest.mark.parametrize(("error", "code"), [(None, 0), ("ValueError", 1), ("Stopped", 0), ("StoppedEarly", 0)])
def test_a_failed_run_is_marked_as_failed_and_a_stopped_one_is_not(run: RunDir, error: str | None, code: int) -> None:
    _write(run, *([Event("run_failed", {"error": error, "text": "t"})] if error else []))
    exits = [record.exit.exit_code for record in _records(run) if record.HasField("exit")]
    assert exits == [code]


def test_trouble_with_wandb_never_ends_a_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = WandbSink(CONFIG, run)

    def broken(*args: Any, **options: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(sink._run, "log", broken)
    with pytest.warns(UserWarning, match=r"the server is gone.*goes on without it"):
        sink.emit(Event("step", {"arm": "tuned", "step": 1, "loss": 2.0}))
    sink.emit(Event("step", {"arm": "tuned", "step": 2, "loss": 2.0}))  # silent from here on
    sink.close()


def test_online_without_an_account_says_what_to_do(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    from quantize.errors import UserError

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", property(lambda self: None))
    online = CONFIG.model_copy(update={"track": CONFIG.track.model_copy(update={"wandb": "online"})})
    with pytest.raises(UserError, match=r"wandb login.*track.wandb=offline"):
        WandbSink(online, run)
