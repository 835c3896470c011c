"""The run on the terminal: headings, one live progress bar, the report. Plain lines where there is no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.events import Event


class ConsoleSink:
    """Prints a run to stdout."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._stage = ""
        self._tenth = -1

    def emit(self, event: Event) -> None:
        """Prints one event, or moves the bar."""
        if event.kind == "progress":
            self._progress(event)
        elif event.kind in _LINES:
            self._end_bar()
            _LINES[event.kind](self, event)

    def close(self) -> None:
        """Takes the bar away."""
        self._end_bar()

    def _progress(self, event: Event) -> None:
        stage, done, total = event.data["stage"], event.data["done"], event.data["total"]
        if not self.console.is_terminal:
            tenth = 10 * done // max(total, 1)
            if (stage, tenth) != (self._stage, self._tenth):
                self._stage, self._tenth = stage, tenth
                self.console.print(f"  {stage}: {done}/{total} {event.data.get('text', '')}", markup=False)
            return
        if self._bar is None or stage != self._stage:
            self._end_bar()
            columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console, transient=True)
            self._bar.start()
            self._stage, self._task = stage, self._bar.add_task(stage, total=total, text="")
        self._bar.update(self._task, completed=done, total=total, text=event.data.get("text", ""))

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._stage, self._tenth = None, "", -1

    def _started(self, event: Event) -> None:
        self.console.print(f"run {event.data['path']}", markup=False)

    def _stage_started(self, event: Event) -> None:
        self.console.print(f"[bold]{event.data['stage']}[/bold]")

    def _stage_finished(self, event: Event) -> None:
        self.console.print(f"  done in {event.data['seconds']:.1f} s", markup=False)

    def _stage_skipped(self, event: Event) -> None:
        self.console.print(f"{event.data['stage']}: already done in this run", markup=False)

    def _message(self, event: Event) -> None:
        if "title" in event.data:
            self.console.print(f"  {event.data['title']}:", markup=False)
        self.console.print(event.data["text"], markup=event.data.get("markup", False))

    def _engine(self, event: Event) -> None:
        self.console.print(f"  tasks: {event.data['tasks']}", markup=False)

    def _report(self, event: Event) -> None:
        from rich.markdown import Markdown

        self.console.print(
            Markdown(event.data["text"]) if self.console.is_terminal else event.data["text"], markup=False
        )
        self.console.print(f"report: {event.data['path']}", markup=False)


_LINES = {
    "run_started": ConsoleSink._started,
    "stage_started": ConsoleSink._stage_started,
    "stage_finished": ConsoleSink._stage_finished,
    "stage_skipped": ConsoleSink._stage_skipped,
    "message": ConsoleSink._message,
    "engine": ConsoleSink._engine,
    "report": ConsoleSink._report,
}
