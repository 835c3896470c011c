"""The line, one step after another:

config -> backend -> model -> data -> tasks -> baseline -> (control) -> fit -> merge -> arms -> quantise -> reload
-> cost -> benchmarks -> report

Each step is a stage of the run directory: done once, with a fingerprint of what it depends on, and skipped when the
same run comes by again. That is also how resume works.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize import surroundings
from quantize.errors import UserError
from train.events import Event, Sink
from train.result import Report, RunResult

if TYPE_CHECKING:
    from quantize.ready import ReadyProcess
    from train.config import RunConfig
    from train.rundir import RunDir


def run(
    config: RunConfig,
    *,
    argv: Sequence[str] = (),
    sinks: Sequence[Sink] | None = None,
    ready: ReadyProcess | None = None,
) -> RunResult:
    """Runs the whole line for `config`, in a new run directory or on in its own.

    Args:
        config: from a file (`load_config`) or made here of its sections; both are checked alike.
        argv: the command line that asked for it; none: the report names the one that repeats the run.
        sinks: where its events go; None prints them.
        ready: what forks the measuring processes, shared by several runs; None = one of this run's own.

    Raises:
        UserError: the input cannot be used; found before training wherever that is possible.
        Stopped: a signal ended the run after its state was saved.
    """
    from train.config_loading import with_packaged_data
    from train.inputs import check_inputs
    from train.rundir import RunDir, default_name

    config = with_packaged_data(config)
    check_inputs(config)
    resolved = config.model_dump(mode="json")
    name = config.run.name or default_name(_config_name(argv), resolved)
    directory = RunDir.create(config.run.root, name, _as_yaml(resolved), resolved)
    return _run_in(directory, config, argv or ["--config", str(directory.path / "config.yaml")], sinks, ready)


def resume(run: str, overrides: Sequence[str] = (), *, argv: Sequence[str] = (), root: str = "runs") -> RunResult:
    """Continues a run that was stopped or killed. `run` is a path or a name under `root`.

    Raises:
        UserError: there is no such run, or `overrides` would change what was already trained.
    """
    from train.config import RunConfig
    from train.rundir import RunDir

    directory = RunDir.open(run, root)
    if overrides:
        raise UserError(f"--resume continues {directory.path} as it was configured; start a new run to change settings")
    config = RunConfig.model_validate(directory.read_json("config.resolved.json"))
    return _run_in(directory, config, argv, None)


def _run_in(
    directory: RunDir,
    config: RunConfig,
    argv: Sequence[str],
    sinks: Sequence[Sink] | None,
    ready: ReadyProcess | None = None,
) -> RunResult:
    from quantize.ready import ReadyProcess
    from quantize.runs import refuse_finished
    from train.evaluations import Evaluations
    from train.signals import StopRequest
    from train.stages import Stages
    from train.tracking import open_sinks

    refuse_finished(directory.path)
    with (
        surroundings.kept(),
        nullcontext(ready) if ready is not None else ReadyProcess() as forks,
        directory.lock(),
        open_sinks(config, directory, sinks) as events,
        StopRequest(directory.resume_command) as stop,
    ):
        stages = Stages(config, directory, events, stop, forks)
        stages.begin(list(argv))
        measure = Evaluations(stages)
        backend = stages.backend()
        model = stages.model()
        data = stages.data(model)
        tasks = measure.tasks(model)
        baseline = measure.baseline(model, data)
        control = stages.control(backend, model, data)
        tuned = stages.tuned(backend, model, data, control)
        arms = measure.arms(data, control, tuned)
        shipped = stages.quantise(tuned)
        final = measure.final(data, arms, control, tuned, shipped)
        cost = measure.cost(tuned, shipped)
        measure.benchmarks(control, tuned, shipped)
        metrics, report = stages.report(tasks, baseline, control, arms, tuned, shipped, final, cost)
        events.emit(Event("run_finished", {"path": str(directory.path)}))
        return RunResult(directory.path, metrics, Report.of(report, directory.path))


def _config_name(argv: Sequence[str]) -> str:
    for index, word in enumerate(argv):
        if word == "--config" and index + 1 < len(argv):
            return Path(argv[index + 1]).stem
        if word.startswith("--config="):
            return Path(word.removeprefix("--config=")).stem
    return "run"


def _as_yaml(resolved: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(resolved, sort_keys=False)
