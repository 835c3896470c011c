"""Reads a sweep file: W&B's own form (`wandb sweep FILE`), from which `train --sweep FILE` runs the same trials here.

Everything that is wrong with the file is found at once. What the values mean for a run is checked in `sweep_check`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantize.errors import UserError
from train.config import RunConfig
from train.config_loading import HOME, read_file
from train.config_messages import did_you_mean, shown
from train.config_values import annotation_at
from train.sweep_command import Command, read_command
from train.sweep_space import Parameter, Space
from train.sweep_values import Malformed, read_values

METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
_KNOWN = (
    "apiVersion", "command", "controller", "description", "early_terminate", "entity", "image_uri", "job", "kind",
    "method", "metric", "metrics", "name", "parameters", "program", "project", "run_cap", "scheduler",
)  # fmt: skip
_ELSEWHERE = {
    "image_uri": "starts jobs of W&B Launch",
    "job": "starts jobs of W&B Launch",
    "metrics": "is for several goals at once; name one under `metric:`",
    "scheduler": "is code that W&B would run; take method bayes, which is Optuna's TPE here",
}
"""Keys of W&B's that have no meaning here, and what they do."""
_NUMBERS = ("max", "max_iter", "min", "min_iter", "mu", "q", "run_cap", "s", "sigma", "eta")
_OWN = {
    "run.name": "is given to each trial by the sweep: the sweep's name and a number",
    "run.root": "is one for all trials; give it on the command line, --run.root=FOLDER",
}


@dataclass(frozen=True)
class EarlyTerminate:
    """Hyperband as W&B has it: at steps first, first * eta, ... a run goes on only among the best 1/eta so far."""

    first: int
    eta: int


@dataclass(frozen=True)
class SweepFile:
    """A sweep as its file describes it.

    Attributes:
        name: W&B's, as the folder of the sweep and its runs have it.
        command: the words beside the trial's options.
    """

    path: Path
    name: str
    method: str
    metric: str
    goal: str
    space: Space
    command: Command
    run_cap: int | None = None
    early: EarlyTerminate | None = None

    def words(self, point: Mapping[str, Any]) -> list[str]:
        """The options of one trial, as W&B's agent would give them."""
        return self.command.words(self.space.arguments(point))


def find_sweep(name: str) -> Path:
    """The file of a sweep: a path, else a packaged one, with or without ".yaml".

    Raises:
        UserError: there is none; lists the packaged ones.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = {file.name: file for file in sorted((HOME / "configs" / "sweeps").glob("*.yaml"))}
    for candidate in (path.name, f"{path.name}.yaml"):
        if candidate in packaged and path.parent in (Path("."), Path("configs/sweeps"), Path("sweeps")):
            return packaged[candidate]
    near = difflib.get_close_matches(path.name, packaged, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--sweep {name}: no such file; {hint}packaged sweeps: {', '.join(packaged) or 'none'}")


def read_sweep(name: str) -> SweepFile:
    """Reads a sweep file.

    Raises:
        UserError: one line for each thing that is wrong, with file and line.
    """
    path = find_sweep(name)
    given, places = read_file(path, "`method:`, `metric:`, `parameters:` and `command:`, as W&B's sweeps have")
    if "model" in given and "method" not in given:
        raise UserError(f"--sweep {path} is a config, no sweep; as train --config {path}")
    reading = _Reading(path, given, places)
    reading.keys()
    method, (metric, goal) = reading.method(), reading.metric()
    space = Space(tuple(reading.parameters(given.get("parameters"), ("parameters",), (), grid=method == "grid")))
    reading.collisions(space)
    command = reading.command()
    named = re.sub(r"[^\w.-]+", "-", str(given.get("name") or path.stem)).strip("-.") or path.stem
    cap, early = reading.whole(("run_cap",), given.get("run_cap")), reading.early()
    reading.as_w_and_b_reads_it()
    if reading.lines:
        raise UserError(*dict.fromkeys(reading.lines))
    return SweepFile(path, named, method, metric, goal, space, command, cap, early)


class _Reading:
    """One file under way: each method reads a part and notes what is wrong."""

    def __init__(self, path: Path, given: Mapping[str, Any], places: Mapping[tuple[str, ...], str]) -> None:
        self.path, self.given, self.places = path, given, places
        self.lines: list[str] = []

    def place(self, key: Sequence[str]) -> str:
        """File and line of a key, or of the nearest above it."""
        above = (tuple(key[:length]) for length in range(len(key), 0, -1))
        return next((self.places[part] for part in above if part in self.places), str(self.path))

    def wrong(self, key: Sequence[str], text: str) -> None:
        """Notes an error."""
        self.lines.append(f"{self.place(key)}: {text}")

    def keys(self) -> None:
        """Keys that W&B has not, or that have no meaning here."""
        for key in self.given:
            if key in _ELSEWHERE:
                self.wrong((key,), f"`{key}` {_ELSEWHERE[key]}; leave it out")
            elif key not in _KNOWN:
                near = difflib.get_close_matches(key, _KNOWN, n=1)
                hint = f"did you mean `{near[0]}`?" if near else "it is none of W&B's sweep keys"
                self.wrong((key,), f"unknown key `{key}`; {hint}")

    def method(self) -> str:
        """How points are chosen."""
        found = self.given.get("method")
        if found not in METHODS:
            what = "is missing" if found is None else f"is {shown(found)}"
            self.wrong(("method",), f"method {what}; choose grid, random or bayes")
        return str(found)

    def metric(self) -> tuple[str, str]:
        """The metric's name and its goal."""
        found = self.given.get("metric")
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            self.wrong(("metric",), "metric is missing; as metric: {name: final.loss, goal: minimize}")
            return "", ""
        for key in found:
            if key not in ("name", "goal", "target", "impute", "impute_while_running"):
                self.wrong(("metric", key), f"unknown key `metric.{key}`; it has name and goal")
        if found.get("goal") not in GOALS:
            what = "is missing" if "goal" not in found else f"is {shown(found['goal'])}"
            self.wrong(("metric", "goal"), f"metric.goal {what}; minimize or maximize")
        return found["name"], str(found.get("goal"))

    def parameters(self, found: Any, at: tuple[str, ...], path: tuple[str, ...], *, grid: bool) -> Iterator[Parameter]:
        """All parameters, those under a further `parameters:` included."""
        if not isinstance(found, dict) or not found:
            self.wrong(at, "parameters is missing; as parameters: {train.learning_rate: {values: [1.0e-4, 2.0e-4]}}")
            return
        for name, given in found.items():
            here = (*at, name)
            if isinstance(given, dict) and set(given) == {"parameters"}:
                yield from self.parameters(given["parameters"], (*here, "parameters"), (*path, name), grid=grid)
                continue
            parameter = self._parameter((*path, name), given, here, grid)
            if parameter is not None:
                yield parameter

    def _parameter(self, path: tuple[str, ...], given: Any, at: tuple[str, ...], grid: bool) -> Parameter | None:
        key = ".".join(path)
        if (normal := key.replace("-", "_")) in _OWN:
            self.wrong(at, f"{key} {_OWN[normal]}")
            return None
        try:
            annotation_at(RunConfig, normal.split("."))
        except KeyError:
            near = did_you_mean(normal)
            hint = f"; did you mean {near}?" if near else "; `train --help` lists all"
            self.wrong(at, f"parameter {key} is no key of the config{hint}")
        if not isinstance(given, dict):
            self.wrong(at, f"parameter {key} is {shown(given)}; expected value: or values: under it")
            return None
        try:
            values = read_values(given, grid=grid)
        except Malformed as error:
            self.wrong(at, f"parameter {key}: {error}")
            return None
        parameter = Parameter(path, values, self.place(at))
        if grid and Space((parameter,)).size is None:
            self.wrong(at, f"parameter {key}: a grid needs value, values, whole numbers from min to max, or q_uniform")
        if normal == "model.backend" and not parameter.constant:
            why = "unsloth changes transformers for the whole process, and all trials run in one"
            self.wrong(at, f"parameter {key}: {why}; make a sweep of each backend, with --model.backend=peft")
        return parameter

    def collisions(self, space: Space) -> None:
        """Two parameters that set the same key."""
        seen: dict[str, Parameter] = {}
        for each in space.parameters:
            other = next((known for known in seen if f"{known}.".startswith(f"{each.key}.")), None)
            other = other or next((known for known in seen if f"{each.key}.".startswith(f"{known}.")), None)
            if other is not None:
                self.lines.append(f"{each.place}: parameter {each.key} sets what {other} sets ({seen[other].place})")
            seen[each.key] = each

    def command(self) -> Command:
        """The options before and after those of the trial."""
        try:
            return read_command(self.given.get("command"), str(self.given.get("program", "")))
        except Malformed as error:
            self.wrong(("command",), str(error))
            return Command()

    def whole(self, key: tuple[str, ...], value: Any) -> int | None:
        """A whole number above 0, or None where it is not given."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.wrong(key, f"{'.'.join(key)} is {shown(value)}; expected a whole number >= 1")
            return None
        return value

    def early(self) -> EarlyTerminate | None:
        """`early_terminate`, with W&B's defaults."""
        found = self.given.get("early_terminate")
        if found is None:
            return None
        if not isinstance(found, dict) or found.get("type") != "hyperband":
            self.wrong(
                ("early_terminate",), "early_terminate has one type, hyperband; as {type: hyperband, min_iter: 3}"
            )
            return None
        for key in found:
            if key not in ("type", "min_iter", "max_iter", "s", "eta", "strict"):
                self.wrong(("early_terminate", key), f"unknown key `early_terminate.{key}`")
        number = {
            key: self.whole(("early_terminate", key), found.get(key)) for key in ("min_iter", "max_iter", "s", "eta")
        }
        eta = number["eta"] or 3
        first = number["min_iter"]
        if first is None and number["max_iter"] and number["s"]:
            first = max(1, number["max_iter"] // eta ** number["s"])
        if first is None:
            self.wrong(("early_terminate",), "early_terminate needs min_iter, or max_iter and s")
        if eta < 2:
            self.wrong(("early_terminate", "eta"), "early_terminate.eta is 1; expected 2 or more")
        return None if first is None else EarlyTerminate(first, eta)

    def as_w_and_b_reads_it(self) -> None:
        """W&B reads YAML 1.1, where `off` is false and `1e-4` is text: a file that means two things is refused."""
        theirs = yaml.safe_load(self.path.read_text(encoding="utf-8")) if self.path.suffix != ".json" else self.given
        for path, ours, other in _differences(self.given, theirs, ()):
            if isinstance(ours, (int, float)) and isinstance(other, str) and path[-1] not in _NUMBERS:
                continue  # on a command line both are the same text
            where = [part for part in path if not part.isdigit()]
            cure = (
                f"write {float(ours):.1e}"
                if isinstance(ours, (int, float)) and not isinstance(ours, bool)
                else "quote it"
            )
            self.wrong(where, f"{where[-1]}: W&B reads {shown(other)} where `train` reads {shown(ours)}; {cure}")


def _differences(ours: Any, theirs: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for (key, one), other in zip(ours.items(), theirs.values(), strict=True):
            yield from _differences(one, other, (*path, str(key)))
    elif isinstance(ours, list) and isinstance(theirs, list):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(one, other, (*path, str(number)))
    elif type(ours) is not type(theirs) or (ours != theirs and ours == ours):
        yield path, ours, theirs
