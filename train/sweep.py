"""`train --sweep FILE`: the trials of a W&B sweep file, one after the other in this process, through Optuna.

Libraries are imported once, and what the runs of one folder share (the untouched model's scores, tokenised data) is
made once. Each trial is an ordinary run. What was chosen and how it ended lies in `<run.root>/sweeps/<name>/study.db`,
so that the same command goes on where a kill or a stop broke off.
"""

from __future__ import annotations

import errno
import gc
import itertools
import math
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import Stopped, UserError
from quantize.files import read_mapping
from quantize.ready import ReadyProcess
from train.events import Event
from train.plan import device_here
from train.signals import StopRequest
from train.sweep_check import Plan, check_sweep
from train.sweep_file import read_sweep
from train.sweep_metrics import TRAINING_LOSS
from train.sweep_report import compare_command, plain_table, ranked, repeat_command, run_name, table, write_results

if TYPE_CHECKING:
    from rich.console import Console

    from train.config import RunConfig
    from train.sweep_study import Study, Trial

_MOST_SHOWN = 50
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def plan_sweep(name: str, overrides: Sequence[str], trials: int | None) -> Plan:
    """Reads and checks a sweep. Raises UserError with all that is wrong."""
    return check_sweep(read_sweep(name), overrides, trials, device_here())


def run_sweep(plan: Plan, *, argv: Sequence[str], debug: bool = False) -> None:
    """Runs the trials that are left, and shows all of them.

    Raises:
        UserError: all trials failed, by what the user gave; or the sweep cannot go on.
        RuntimeError: all trials failed, otherwise.
        Stopped: a signal came; the state is saved.
    """
    from rich.console import Console

    from train.sweep_study import open_study, require_optuna

    require_optuna()
    command = shlex.join(["train", *argv])
    folder = folder_of(plan)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    with open_study(folder, plan) as study, StopRequest(command) as stop, ReadyProcess() as ready:
        console.print(describe(plan, done=len(study.ended())))
        write_results(folder, plan, study.ended(), command)
        runner = _Runner(plan, study, stop, ready, command, console, debug)
        while (trial := study.next()) is not None:
            runner.trial(trial)
            write_results(folder, plan, study.ended(), command)
        _show(plan, study, folder, console)
    _refuse_all_failed(study)


def folder_of(plan: Plan) -> Path:
    """Where the state and the results of a sweep lie."""
    return plan.root / "sweeps" / plan.sweep.name


def describe(plan: Plan, done: int = 0) -> str:
    """What will run, in a few lines."""
    sweep, space = plan.sweep, plan.sweep.space
    where = f"{plan.root / run_name(plan, 0)} and on"
    lines = [f"sweep {sweep.name}: {sweep.method}, {plan.trials} trials, runs in {where}, state in {folder_of(plan)}"]
    lines += [f"  {done} have ended already"] if done else []
    lines.append(f"  {sweep.goal} {sweep.metric}")
    lines += [f"  {each.key}: {_values(each.values)}" for each in space.varied]
    if sweep.early is not None:
        first, eta = sweep.early.first, sweep.early.eta
        lines.append(f"  early stop, by the training loss after {first} steps, {first * eta}, ...: 1 in {eta} goes on")
    return "\n".join([*lines, *(f"  {note}" for note in plan.notes)])


def render_sweep(plan: Plan) -> tuple[str, tuple[str, ...]]:
    """What `--dry-run` says: the trials, and the steps and needs of the first; and what would stop them."""
    from train.plan import estimate, render

    sweep = plan.sweep
    lines = [describe(plan), "", f"{plan.configs} configs were checked, the first in full:"]
    if sweep.method == "grid":
        points = itertools.islice(sweep.space.points(), plan.trials)
        trials = [f"  {number}: {' '.join(sweep.space.arguments(point))}" for number, point in enumerate(points)]
        left = len(trials) - _MOST_SHOWN
        more = [f"  and {left} more"] if left > 0 else []
        lines = [describe(plan), "", "trials", *trials[:_MOST_SHOWN], *more, "", "the first of them:"]
    first = estimate(plan.first)
    disk = first.total_disk
    total = [f"disk of all {plan.trials} trials, about: {plan.trials * disk / 2**30:,.1f} GiB"] if disk else []
    return "\n".join([*lines, render(first, plan.first), "", *total]), first.obstacles


def _values(values: Any) -> str:
    listed = getattr(values, "values", None)
    if listed is not None:
        return ", ".join("null" if value is None else str(value) for value in listed)
    low, high = values.probes()
    return f"{low:g} to {high:g}"


class _Runner:
    """Runs one trial after the other."""

    def __init__(
        self,
        plan: Plan,
        study: Study,
        stop: StopRequest,
        ready: ReadyProcess,
        command: str,
        console: Console,
        debug: bool,
    ) -> None:
        self.plan, self.study, self.stop, self.ready, self.command = plan, study, stop, ready, command
        self.console, self.debug = console, debug

    def trial(self, trial: Trial) -> None:
        """Runs it, or takes the outcome of an earlier one with the same values; notes how it ended."""
        from train.sweep_study import Outcome

        options = " ".join(self.plan.sweep.space.arguments(trial.point))
        again = ", which was begun before" if trial.begun else ""
        self.console.print(f"\ntrial {trial.number} ({trial.number + 1} of {self.plan.trials}){again}: {options}")
        known = self.study.same(trial)
        if known is not None:
            earlier = known.outcome.same_as if known.outcome.same_as is not None else known.number
            self.console.print(f"  the same values as trial {earlier}, whose outcome it takes")
            outcome = Outcome(**(vars(known.outcome) | {"seconds": 0.0, "same_as": earlier}))
        else:
            outcome = self._run(trial)
            value = "" if outcome.value is None else f", {self.plan.sweep.metric} {outcome.value:.6g}"
            reason = f": {outcome.error}" if outcome.error else ""
            self.console.print(f"  {outcome.state} in {outcome.seconds:.1f} s{value}{reason}")
        self.stop.graceful = True  # what is written here is written whole
        self.study.tell(trial, outcome)
        self.stop.graceful = False
        if self.stop.requested:
            raise self.stop.stopped()

    def _run(self, trial: Trial) -> Any:
        from train.sweep_study import Outcome

        name, started = run_name(self.plan, trial.number), time.monotonic()
        state, value, error, code = "failed", None, None, 0
        try:
            value, error = self._measure(name, trial)
            state, code = ("complete", 0) if error is None else ("failed", 2)
        except StoppedEarly:
            state = "stopped early"
        except Stopped as stopped:
            raise Stopped(stopped.signal_number, self.command) from None
        except OSError as problem:
            if problem.errno in _FULL:
                free = f"{problem.strerror} ({problem.filename}); free some space"
                raise UserError(f"{free}, then continue with: {self.command}") from problem
            error, code = self._failure(problem, name), 1
        except _Elsewhere:
            raise
        except UserError as problem:
            error, code = "; ".join(problem.lines), 2
        except Exception as problem:
            error, code = self._failure(problem, name), 1
        if state != "complete":
            _free_memory()
        return Outcome(state, value, round(time.monotonic() - started, 3), error, code)

    def _measure(self, name: str, trial: Trial) -> tuple[float | None, str | None]:
        """The metric of a trial's run, or why it has none."""
        from train.pipeline import run

        plan, metric = self.plan, self.plan.sweep.metric
        own = f"--run.name={name}"
        config = plan.load(trial.point, own)
        _refuse_other(plan.root / name, config, self.command)
        argv = ["--config", plan.config, *plan.words(trial.point), own]
        listener = _Listener(self.study, trial)
        result = run(config, argv=argv, sinks=[_quiet_console(), listener], ready=self.ready)
        if metric == TRAINING_LOSS:
            from train.rundir import RunDir

            losses = RunDir(result.path).training_losses("tuned")
            return (losses[-1][1], None) if losses else (None, f"{metric}: no step was logged")
        value = _at(result.metrics, metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value), None
        why = result.metrics["why"]
        parts = metric.split(".")
        above = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return None, f"{metric} has no number: {next((why[key] for key in above if key in why), 'no such key')}"

    def _failure(self, problem: Exception, name: str) -> str:
        if self.debug:
            traceback.print_exc(file=sys.stderr)
        first = next(iter(str(problem).splitlines()), "")
        run = shlex.quote(str(self.plan.root / name))
        return f"{type(problem).__name__}: {first}; the traceback: train --resume {run} --debug"


class StoppedEarly(Exception):
    """Ends a run whose training loss is among the worse ones; the sweep goes on."""


class _Elsewhere(UserError):
    """The sweep cannot go on: it is no fault of a trial."""


class _Listener:
    """Hands the training loss to the study, and ends the run where that says so."""

    def __init__(self, study: Study, trial: Trial) -> None:
        self._study, self._trial = study, trial

    def emit(self, event: Event) -> None:
        """Looks at steps of the run's own training."""
        if event.kind == "step" and event.data["arm"] == "tuned":
            step = int(event.data["step"])
            if self._study.report(self._trial, step, float(event.data["loss"])):
                raise StoppedEarly(f"the training loss at step {step} is among the worse ones of the sweep")

    def close(self) -> None:
        """Nothing is held."""


def _quiet_console() -> Any:
    """The console without each run's report, and without a line for each tenth where there is no live bar."""
    from train.console import ConsoleSink

    class Quiet(ConsoleSink):
        def emit(self, event: Event) -> None:
            if event.kind not in ("report", "message") and (self.console.is_terminal or event.kind != "progress"):
                super().emit(event)

    return Quiet()


def _refuse_other(path: Path, config: RunConfig, command: str) -> None:
    """A run of that name with other settings: of another sweep, or of this one before its state was deleted."""
    settings = path / "config.resolved.json"
    if settings.is_file() and read_mapping(settings) != config.model_dump(mode="json"):
        raise _Elsewhere(
            f"{path} holds a run with other settings; give the sweep another `name:`, or move that run away, then "
            f"continue with: {command}"
        )


def _at(metrics: Any, key: str) -> Any:
    """The value under a dotted key; names in it may have dots themselves."""
    if not isinstance(metrics, dict):
        return None
    if key in metrics:
        return metrics[key]
    starts = [name for name in metrics if key.startswith(f"{name}.")]
    found = (_at(metrics[name], key[len(name) + 1 :]) for name in starts)
    return next((value for value in found if value is not None), None)


def _free_memory() -> None:
    """A run that was ended by an error leaves its model to the collector."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _show(plan: Plan, study: Study, folder: Path, console: Console) -> None:
    """The table, and what to do with it."""
    ended = study.ended()
    console.print(f"\n{plain_table(table(plan, ended))}\n")
    best = next((each for each in ranked(plan, ended) if each.outcome.value is not None), None)
    if best is not None:
        console.print(f"best: trial {best.number}; again, as a run of its own:\n  {repeat_command(plan, best)}")
        pair = compare_command(plan, ended)
        if pair:
            console.print(f"whether it differs from the next one, in pairs:\n  {pair}")
    console.print(f"written: {folder / 'sweep.md'}, {folder / 'sweep.json'}")


def _refuse_all_failed(study: Study) -> None:
    """The exit code of a sweep without one good trial is that of its failures."""
    outcomes = [each.outcome for each in study.ended()]
    if any(outcome.state != "failed" for outcome in outcomes):
        return
    reasons = dict.fromkeys(str(outcome.error) for outcome in outcomes)
    if all(outcome.code == 2 for outcome in outcomes):
        raise UserError(f"all {len(outcomes)} trials failed", *reasons)
    raise RuntimeError(f"all {len(outcomes)} trials failed: {next(iter(reasons))}")
