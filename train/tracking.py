"""Opens a run's sinks: events.jsonl always, the console by default, W&B where the config asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from train.events import Event, JsonlSink, Sink, Sinks

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.rundir import RunDir


@contextmanager
def open_sinks(config: RunConfig, directory: RunDir, sinks: Sequence[Sink] | None) -> Iterator[Sinks]:
    """The sinks of one run, closed at its end. `sinks` replaces the console."""
    from train.console import ConsoleSink

    opened: list[Sink] = [JsonlSink(directory.path / "events.jsonl")]
    opened += [ConsoleSink()] if sinks is None else list(sinks)
    if config.track.wandb != "off":
        from train.wandb_sink import WandbSink

        sink = WandbSink(config, directory)
        directory.update_manifest(wandb_run_id=sink.run_id)
        opened.append(sink)
    fan_out = Sinks(opened)
    try:
        yield fan_out
    except BaseException as error:
        with contextlib.suppress(Exception):  # a sink that fails must not hide why the run did
            fan_out.emit(Event("run_failed", {"error": type(error).__name__, "text": str(error)}))
        raise
    finally:
        fan_out.close()
