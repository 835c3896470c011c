"""Whether the trials of a sweep can run, told before the first one: every value, or every combination where few."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from train.config import RunConfig, resolved_dict
from train.config_loading import load_config
from train.config_values import parse_options
from train.inputs import missing_inputs
from train.sweep_command import EXAMPLE
from train.sweep_file import SweepFile
from train.sweep_metrics import Kind, kind_of, why_not

_MOST_LINES = 20
_OWN_OPTIONS = ("--resume", "--sweep", "--trials")


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked, and the command line's options for all of its trials.

    Attributes:
        config: what the command's --config names.
        overrides: options behind --sweep; they win over the file's.
        trials: how many there will be; None = one for each point of the grid.
        root: the folder of all runs.
        first: the config of the first point that was checked.
        configs: how many configs were checked.
        notes: what differs from W&B here.
    """

    sweep: SweepFile
    config: str
    overrides: tuple[str, ...]
    trials: int
    root: Path
    first: RunConfig
    configs: int
    notes: tuple[str, ...] = ()

    def words(self, point: Mapping[str, Any]) -> list[str]:
        """All options of one trial but --config, as typed after `train`."""
        return [*options_of(self.sweep.words(point))[1], *self.overrides]

    def load(self, point: Mapping[str, Any], *more: str) -> RunConfig:
        """The config of one trial."""
        return load_config(self.config, [*self.words(point), *more])


def options_of(words: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """The --config of a sweep's command, its other options, and what is wrong with them."""
    from train.cli import split_arguments

    line = split_arguments(words)
    errors = list(line.errors)
    errors += [f"{flag} has no place in a sweep's command" for flag in sorted(line.flags - {"--debug"})]
    given = dict(zip(_OWN_OPTIONS, (line.resume, line.sweep, line.trials), strict=True))
    errors += [f"{name} has no place in a sweep's command" for name, value in given.items() if value is not None]
    return line.config, list(line.overrides), errors


def check_sweep(sweep: SweepFile, overrides: Sequence[str], trials: int | None, device: str) -> Plan:
    """Loads the config of every point that is to be checked, and looks for what would stop a trial.

    Args:
        overrides: options for all trials.
        trials: of --trials.
        device: "cuda" or "cpu", where the trials will run.

    Raises:
        UserError: one line for each thing that is wrong.
    """
    lines = [*_wrong_options(sweep, overrides)]
    config, _, errors = options_of(sweep.command.words([]))
    lines += [f"{sweep.path}: command: {error}" for error in errors]
    if config is None:
        lines.append(f"{sweep.path}: command names no config; as {EXAMPLE}")
    if lines or config is None:
        raise UserError(*lines)
    count, error = _count(sweep, trials)
    lines += [error] if error else []
    overrides, notes = _locally(sweep, overrides)
    configs = list(_loaded(sweep, config, overrides, lines))
    lines += _without_metric(sweep, configs, device)
    lines += () if lines else dict.fromkeys(_missing(configs))  # it takes seconds
    if lines:
        raise UserError(*_shortened(lines))
    root = Path(configs[0].run.root).expanduser()
    return Plan(sweep, config, overrides, count, root, configs[0], len(configs), tuple(notes))


def _wrong_options(sweep: SweepFile, overrides: Sequence[str]) -> Iterator[str]:
    """Options that are no options, that every trial would share, or that set what the sweep varies."""
    options, errors = parse_options(RunConfig, overrides)
    yield from errors
    for option in options:
        key = ".".join(option.path)
        if key == "run.name":
            yield f"{option.option}: each trial has a name of its own; the sweep's is `name:` in {sweep.path}"
        for each in sweep.space.parameters:
            if f"{each.key}.".startswith(f"{key}.") or f"{key}.".startswith(f"{each.key}."):
                yield f"{option.option}: {each.key} is a parameter of the sweep ({each.place}); take one of them out"


def _count(sweep: SweepFile, trials: int | None) -> tuple[int, str | None]:
    """How many trials there will be."""
    asked = trials if trials is not None else sweep.run_cap
    size = sweep.space.size
    if sweep.method == "grid":
        assert size is not None, "a grid's points are listed"
        return (size if asked is None else min(size, asked)), None
    if asked is None:
        return 0, f"{sweep.path}: method {sweep.method} has no end of its own; give --trials=20, or run_cap in the file"
    return asked, None


def _locally(sweep: SweepFile, overrides: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """W&B online is for its own agents; here it is off, unless the command line says otherwise."""
    options, _ = parse_options(RunConfig, options_of(sweep.command.words([]))[1])
    online = [option for option in options if option.path == ("track", "wandb") and option.value == "online"]
    given, _ = parse_options(RunConfig, overrides)
    if not online or any(option.path == ("track", "wandb") for option in given):
        return tuple(overrides), []
    note = "W&B: off here, where the file says online for its own agents; --track.wandb=online or offline sets it"
    return (*overrides, "--track.wandb=off"), [note]


def _loaded(sweep: SweepFile, config: str, overrides: Sequence[str], lines: list[str]) -> Iterator[RunConfig]:
    """The config of each point to check; what is wrong with them goes to `lines`, each once with the first point."""
    found: dict[str, list[str]] = {}
    for point in sweep.space.probes():
        try:
            yield load_config(config, [*options_of(sweep.words(point))[1], *overrides])
        except UserError as error:
            for line in error.lines:
                found.setdefault(line, []).append(" ".join(sweep.space.arguments(point)))
    for line, points in found.items():
        more = f" and {len(points) - 1} more" if len(points) > 1 else ""
        lines.append(f"{line}; in the trial {points[0]}{more}")


def _missing(configs: Sequence[RunConfig]) -> Iterator[str]:
    """Models, data, tasks and group sizes that cannot be used; data and tasks, slow to read, are read once each."""
    seen: set[str] = set()
    for config in configs:
        parts = {"model", "qat", "quantize"}
        sections = {
            name: json.dumps([name, config.train.method, config.model_dump(mode="json", include={name})])
            for name in ("data", "eval")
        }
        least = config.fake_quant.min_coverage
        method = json.dumps([config.train.method, config.grpo.rewards])
        whole = json.dumps([config.model_dump(mode="json", include=parts), least, method, *sections.values()])
        if whole not in seen:
            yield from missing_inputs(config, [name for name, text in sections.items() if text in seen])
        seen |= {whole, *sections.values()}


def _without_metric(sweep: SweepFile, configs: Sequence[RunConfig], device: str) -> Iterator[str]:
    """Why some trials would have no number to compare."""
    distinct = dict.fromkeys(kind_of(config, device) for config in configs)
    for kind in distinct:
        reason = why_not(sweep.metric, kind)
        if reason is not None:
            which = "" if len(distinct) == 1 else f" in trials with {_told(kind)}"
            yield f"{sweep.path}: metric.name: {sweep.metric} is not reported{which}: {reason}"
            return


def _told(kind: Kind) -> str:
    """A kind of trial in short."""
    format_ = f"{'qat' if kind.qat else 'quantize.scheme'}={kind.scheme}" if kind.scheme else "qat=None"
    return f"{format_}, eval.control={str(kind.control).lower()}"


def _shortened(lines: Sequence[str]) -> list[str]:
    left = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"and {left} more of the kind"] if left > 0 else [])]


def settings_of(plan: Plan) -> dict[str, Any]:
    """What must be the same for a sweep to go on: all but the number of trials."""
    sweep, first = plan.sweep, resolved_dict(plan.first)
    first["run"] = {key: value for key, value in first["run"].items() if key != "root"}
    parameters = [[each.key, repr(each.values)] for each in sweep.space.parameters]
    early = None if sweep.early is None else [sweep.early.first, sweep.early.eta]
    asked = {"method": sweep.method, "metric": sweep.metric, "goal": sweep.goal, "early_terminate": early}
    return {**asked, "parameters": parameters, "first": first}
