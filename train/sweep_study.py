"""The trials of a sweep on disk, in Optuna's form: which is next, how each ended. The only file that imports optuna.

One process at a time works on a sweep. A trial is one row of `study.db` from the moment it is chosen, so that one that
was cut short by a kill is found again with the values that it had.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.files import read_mapping, write_atomically
from train.sweep_check import Plan, settings_of

if TYPE_CHECKING:
    import optuna

STATES = ("complete", "failed", "stopped early")
_FEWEST_RANDOM, _MOST_RANDOM = 3, 10
"""Trials that bayes draws at random before it has something to go by: a quarter of all, within these."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: one of `STATES`.
        value: the metric, where the trial is complete.
        error: why it failed.
        code: the exit code that such a failure has.
        same_as: the earlier trial with the same values, whose outcome this is.
    """

    state: str
    value: float | None = None
    seconds: float = 0.0
    error: str | None = None
    code: int = 0
    same_as: int | None = None


@dataclass
class Trial:
    """One trial that is to be run, or to be finished.

    Attributes:
        live: Optuna's handle on it.
        begun: an earlier process began it.
        steps: the training steps whose loss was already reported.
    """

    number: int
    point: dict[str, Any]
    live: optuna.Trial
    begun: bool = False
    steps: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Ended:
    """A trial that has ended."""

    number: int
    point: dict[str, Any]
    outcome: Outcome


def require_optuna() -> None:
    """Raises UserError where it is not installed, with what to do."""
    import importlib.util

    if importlib.util.find_spec("optuna") is None:
        raise UserError("--sweep: optuna is not installed; pip install 'ongrid[sweep]', or pip install 'optuna>=5,<6'")


@contextmanager
def open_study(folder: Path, plan: Plan) -> Iterator[Study]:
    """The study of a sweep, new or as an earlier process left it, kept from other processes.

    Raises:
        UserError: the folder holds a sweep with other settings, or another process works on it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"run.root: {folder} cannot be written ({error.strerror}); choose another run.root") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is in use by another process; wait for it, or stop it") from error
        settings, wanted = folder / "settings.json", json.loads(json.dumps(settings_of(plan)))
        if settings.is_file():
            changed = _changed(read_mapping(settings), wanted)
            if changed:
                raise UserError(
                    f"{folder} holds a sweep with other settings ({', '.join(changed)}); give this one another `name:` "
                    f"in {plan.sweep.path}, or another run.root"
                )
        else:
            write_atomically(settings, json.dumps(wanted, indent=1))
        yield Study(folder, plan)


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, by name; of the config its keys."""
    names = [key for key in new if key != "first" and old.get(key) != new[key]]
    first, now = old.get("first", {}), new["first"]
    for name, value in now.items():
        before = first.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            names += [f"{name}.{key}" for key in value if value[key] != before.get(key)]
        elif value != before:
            names.append(name)
    return names


class Study:
    """Chooses points and keeps outcomes."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        import optuna
        from sqlalchemy.engine import URL

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.plan, self._optuna = plan, optuna
        url = URL.create("sqlite", database=str(folder.resolve() / "study.db")).render_as_string()
        early = plan.sweep.early
        pruner: Any = optuna.pruners.NopPruner()
        if early is not None:
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=early.first, reduction_factor=early.eta)
        try:
            self._study = optuna.create_study(
                storage=optuna.storages.RDBStorage(url),
                study_name=plan.sweep.name,
                direction="minimize" if plan.sweep.goal == "minimize" else "maximize",
                pruner=pruner,
                load_if_exists=True,
            )
        except Exception as error:  # sqlalchemy and optuna raise many kinds
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{folder / 'study.db'} cannot be read ({reason}); delete {folder} to begin anew"
            ) from error

    def ended(self) -> list[Ended]:
        """The trials that have ended, in order."""
        finished = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()]
        return [
            Ended(trial.number, trial.user_attrs["point"], Outcome(**trial.user_attrs["outcome"])) for trial in finished
        ]

    def next(self) -> Trial | None:
        """The trial that was cut short, else a new one; None where there are enough, or all points were tried."""
        trials = self._study.get_trials(deepcopy=False)
        running = next((trial for trial in trials if trial.state == self._optuna.trial.TrialState.RUNNING), None)
        if running is not None:
            self._seed(running.number)
            live = self._optuna.Trial(self._study, running._trial_id)
            return self._trial(live, begun=True, steps=set(running.intermediate_values))
        ended = self.ended()
        if len(ended) >= self.plan.trials:
            return None
        space = self.plan.sweep.space
        if space.size is not None and len({_text(each.point) for each in ended}) >= space.size:
            return None
        self._seed(len(ended))
        if self.plan.sweep.method == "grid" and len(trials) == len(ended):  # else one waits that a kill left
            point = next(point for number, point in enumerate(space.points()) if number == len(ended))
            self._study.enqueue_trial(space.drawn(point))
        return self._trial(self._study.ask())

    def _trial(self, live: optuna.Trial, *, begun: bool = False, steps: set[int] | None = None) -> Trial:
        point = self.plan.sweep.space.draw(live)
        live.set_user_attr("point", point)
        return Trial(live.number, point, live, begun, steps or set())

    def _seed(self, number: int) -> None:
        """A sampler for this one trial, so that a sweep that was broken off goes on as it would have."""
        seed = self.plan.first.run.seed + 1000003 * number
        if self.plan.sweep.method == "bayes":
            random = max(_FEWEST_RANDOM, min(_MOST_RANDOM, self.plan.trials // 4))
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=random)
        else:
            self._study.sampler = self._optuna.samplers.RandomSampler(seed=seed % 2**32)

    def same(self, trial: Trial) -> Ended | None:
        """An earlier trial with the same values: it would give the same numbers."""
        text = _text(trial.point)
        return next((each for each in self.ended() if _text(each.point) == text), None)

    def report(self, trial: Trial, step: int, loss: float) -> bool:
        """Notes the training loss at a step; whether the trial is to stop early."""
        if self.plan.sweep.early is None:
            return False
        if step not in trial.steps:
            trial.steps.add(step)
            trial.live.report(loss if self.plan.sweep.goal == "minimize" else -loss, step)
        return bool(trial.live.should_prune())

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        """Notes how a trial ended."""
        states = self._optuna.trial.TrialState
        trial.live.set_user_attr("outcome", vars(outcome))
        if outcome.state == "complete":
            self._study.tell(trial.live, outcome.value)
        else:
            self._study.tell(trial.live, state=states.FAIL if outcome.state == "failed" else states.PRUNED)


def _text(point: dict[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)
