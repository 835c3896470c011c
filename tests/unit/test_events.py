"""Events, their sinks, the console, and signals."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantize.errors import Stopped
from train.config import DataConfig, ModelConfig, RunConfig
from train.console import ConsoleSink
from train.events import Event, JsonlSink, Sinks
from train.rundir import RunDir
from train.signals import StopRequest
from train.tracking import open_sinks


class Recorder:
    """Remembers what it is told, and can fail at the end."""

    def __init__(self, failing: bool = False) -> None:
        self.events: list[Event] = []
        self.closed, self.failing = False, failing

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True
        if self.failing:
            raise OSError("cannot close")


def test_the_file_holds_a_line_an_event_and_no_progress(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "events.jsonl")
    for kind in ("stage_started", "progress", "stage_finished"):
        sink.emit(Event(kind, {"stage": "data", "done": 1, "total": 2}))
    sink.close()
    JsonlSink(tmp_path / "events.jsonl").emit(Event("run_finished"))
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["stage_started", "stage_finished", "run_finished"]
    assert lines[0]["stage"] == "data"


def test_all_sinks_are_closed_even_if_one_cannot_be() -> None:
    first, broken, last = Recorder(), Recorder(failing=True), Recorder()
    with pytest.raises(OSError, match="cannot close"):
        Sinks([first, broken, last]).close()
    assert first.closed and last.closed


def _run_dir(root: Path) -> tuple[RunConfig, RunDir]:
    config = RunConfig(model=ModelConfig(id="m"), data=DataConfig(train="d"))
    resolved = config.model_dump(mode="json")
    return config, RunDir.create(str(root), "run", "", resolved)


def test_a_run_that_fails_says_so_to_every_sink(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError), open_sinks(*_run_dir(tmp_path), [recorder]):
        _ = 1 / 0
    assert recorder.closed
    assert [(event.kind, event.data["error"]) for event in recorder.events] == [("run_failed", "ZeroDivisionError")]
    assert "division by zero" in (tmp_path / "run" / "events.jsonl").read_text()


def _console(terminal: bool) -> tuple[ConsoleSink, Callable[[], str]]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, soft_wrap=True, highlight=False)
    return ConsoleSink(console), stream.getvalue


def _progress(done: int, total: int) -> Event:
    return Event("progress", {"stage": "fit-tuned", "done": done, "total": total, "text": "loss 1.2345"})


def test_without_a_terminal_progress_is_a_line_for_each_tenth() -> None:
    sink, text = _console(terminal=False)
    for step in range(1, 101):
        sink.emit(_progress(step, 100))
    sink.close()
    lines = text().splitlines()
    assert len(lines) <= 11
    assert lines[-1] == "  fit-tuned: 100/100 loss 1.2345"


def test_on_a_terminal_there_is_a_bar_which_goes_away() -> None:
    sink, text = _console(terminal=True)
    sink.emit(Event("stage_started", {"stage": "fit-tuned"}))
    for step in (1, 2, 3):
        sink.emit(_progress(step, 3))
    sink.emit(Event("stage_finished", {"stage": "fit-tuned", "seconds": 1.0}))
    sink.close()
    assert "3/3" in text() and "loss 1.2345" in text() and "done in 1.0 s" in text()


@pytest.mark.parametrize("terminal", [True, False])
def test_square_brackets_in_texts_stay(terminal: bool) -> None:
    sink, text = _console(terminal=terminal)
    sink.emit(Event("run_started", {"path": "/tmp/[bold]run"}))
    sink.emit(Event("message", {"text": "rows [1, 2] and [red]"}))
    sink.emit(Event("report", {"text": "loss 1.0 [0.9, 1.1]", "path": "/tmp/[x]/report.md"}))
    sink.close()
    for part in ("[bold]run", "[1, 2] and [red]", "[0.9, 1.1]", "[x]/report.md"):
        assert part in text()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_training_example_shows_what_is_learned(terminal: bool) -> None:
    sink, text = _console(terminal=terminal)
    data = {"text": "2+2? [green]4[/green]", "title": "one training example", "markup": True}
    sink.emit(Event("message", data))
    sink.close()
    assert "one training example:" in text()
    assert ("\x1b[32m4" in text()) is terminal
    assert "[green]" not in text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_while_training_and_ends_at_once_elsewhere(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest("train --resume x") as stop:
        stop.graceful = True
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(Stopped, match="train --resume x"):  # a second one does not wait
            os.kill(os.getpid(), number)
    with StopRequest("train --resume x") as stop, pytest.raises(Stopped) as raised:
        os.kill(os.getpid(), number)
    assert raised.value.signal_number == number
    assert signal.getsignal(number) == before


def test_a_notebooks_thread_keeps_its_signal_handlers() -> None:
    import threading

    seen: list[Any] = []

    def work() -> None:
        with StopRequest("train --resume x") as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
