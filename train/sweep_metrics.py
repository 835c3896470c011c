"""Which numbers a run will report, told before it runs: those of stand-in scores for the arms that it will have."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.task_files import expand
from quantize.task_rows import OWN, PREFERENCES, REWARDS
from train.config import RunConfig
from train.method_settings import measured_by_method
from train.plan_steps import cannot_run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRAINING_LOSS = "tuned/loss"
"""The loss that was logged last in training, by the name that W&B's curves have; in metrics.json it is not."""
_APART = ("why", "layers", "coverage.skipped", "elsewhere.packages", "tasks", "tasks_mean")
_SHIPPED_SIZES = ("final_mib", "memory_mib", "bits_per_weight")
_TASK_PARTS = ("value", "low", "high")


@dataclass(frozen=True)
class _StandIn:
    """Scores of one arm, invented: only which keys of metrics.json they lead to is looked at."""

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    exact: NDArray[np.bool_]
    kl: NDArray[np.float64] | None
    top1: NDArray[np.int64] | None


@dataclass(frozen=True)
class Kind:
    """What of a config decides which numbers its run will have.

    Attributes:
        scheme: what ships; None = nothing is quantised.
        qat: trained for it, `inside` = with the adapter inside the fake quantiser.
        control: the twin without QAT is trained.
        batches: for which decoding is timed.
        tasks: the names that results are reported under.
        simulated: the target cannot run here.
    """

    scheme: str | None
    qat: bool
    inside: bool
    control: bool
    batches: tuple[int, ...]
    tasks: tuple[str, ...]
    simulated: bool


def kind_of(config: RunConfig, device: str) -> Kind:
    """The kind of a config that runs on "cuda" or "cpu"."""
    qat = config.qat is not None
    return Kind(
        scheme=config.scheme_name,
        qat=qat,
        inside=qat and config.fake_quant.placement == "inside",
        control=qat and config.eval.control,
        batches=tuple(config.eval.cost_batches),
        tasks=(*expand(config.eval.tasks), *_own_tasks(config)),
        simulated=cannot_run(config, device) is not None,
    )


def _own_tasks(config: RunConfig) -> tuple[str, ...]:
    """What a method measures among the tasks: `quantize.task_rows.OWN`."""
    if measured_by_method(config) is None:
        return ()
    return (PREFERENCES,) if config.train.method == "dpo" else (REWARDS,)


def why_not(metric: str, kind: Kind) -> str | None:
    """Why a run of this kind has no number of that name, a dotted one of metrics.json or `TRAINING_LOSS`; else None."""
    if metric == TRAINING_LOSS:
        return None
    if metric.startswith(("tasks.", "tasks_mean.")):
        return _why_no_task(metric, kind)
    metrics = _expected(kind)
    values = dict(_leaves(metrics))
    above = (metric.rsplit(".", length)[0] for length in range(metric.count(".") + 1))
    found = next((key for key in above if key in values), None)
    if found is None or (found != metric and values[found] is not None):
        numbers = [key for key, value in values.items() if _is_number(value)]
        near = difflib.get_close_matches(metric, [*numbers, TRAINING_LOSS], n=1)
        return f"no such key in metrics.json{f'; did you mean {near[0]}?' if near else '; docs/RUN.md lists all'}"
    if values[found] is None:
        return _reason(metric, metrics["why"])
    return None if _is_number(values[found]) else "it is no number"


@functools.cache
def _expected(kind: Kind) -> dict[str, Any]:
    from quantize.metrics import build_metrics

    scheme, control = kind.scheme, kind.control
    arms = ["base", "tuned", *(["control"] if control else [])]
    arms += ["base_quantized", "final", *(["ptq"] if control else [])] if scheme else []
    ships = scheme is not None and not kind.simulated
    sizes = ("base_mib", "tuned_mib", *(_SHIPPED_SIZES if ships else ()))
    timed = {"prefill_tokens_per_s": 1.0, "decode_ms": {str(n): 1.0 for n in kind.batches}, "peak_mib": 1.0}
    return build_metrics(
        arms={name: _stand_in(number, name) for number, name in enumerate(arms)},
        why=_reasons(kind),
        train_ship_gap=0.0 if kind.qat else None,
        backend_gap=None if kind.qat and not kind.inside else 0.0,
        reference="control" if control else "tuned",
        size=dict.fromkeys(sizes, 1.0),
        coverage={"quantized_fraction": 1.0, "share_of_all_weights": 1.0} if scheme else {},
        scheme=scheme,
        target="" if scheme else None,
        dtype="",
        simulated=kind.simulated,
        layers={"layer": {"sqnr_db": 1.0}} if scheme else None,
        cost=[timed, timed] if ships and kind.batches else None,
    )


def _stand_in(number: int, arm: str) -> _StandIn:
    """Samples that differ enough for every interval to exist; quantised arms lose more."""
    import numpy as np

    spread = np.random.default_rng(number).uniform(0.5, 1.5, 40)
    worse = {"ptq": 2.0, "final": 1.5}.get(arm, 1.0)
    ones = np.ones(40, dtype=np.int64)
    compared = arm in ("ptq", "final")
    exact = np.arange(40) % (number + 2) == 0
    same = exact.astype(np.int64)
    return _StandIn(worse * spread, ones, exact, spread if compared else None, same if compared else None)


def _reasons(kind: Kind) -> dict[str, str]:
    """As `quantize.run_report` will give them."""
    why: dict[str, str] = {}
    if kind.scheme is None:
        parts = ("base_quantized", "ptq", "final", *(f"size.{key}" for key in _SHIPPED_SIZES))
        why |= dict.fromkeys(parts, "neither qat nor quantize.scheme is set")
    if not kind.control:
        why["control"] = "eval.control is false" if kind.qat else "a run without qat has no control"
        why.setdefault("ptq", why["control"])
    if not kind.qat:
        why["train_ship_gap"] = "a run without qat has none"
    elif not kind.inside:
        why["backend_gap"] = "fake_quant.placement is outside"
    if not kind.batches:
        why["cost"] = "eval.cost_batches is empty"
    if kind.simulated:
        why |= dict.fromkeys((f"size.{key}" for key in _SHIPPED_SIZES), "the target cannot run here")
    return why


def _why_no_task(metric: str, kind: Kind) -> str | None:
    """`tasks.NAME.ARM.value` and the like; what lm-eval will find in a task is not known here, only its arms are."""
    names = kind.tasks
    if not names:
        return "eval.tasks is empty, and train.method is neither dpo nor grpo"
    if metric.startswith("tasks_mean."):
        if len(set(names) - OWN.keys()) < 2:
            return "a mean needs two tasks"
        *above, last = metric.split(".")[1:]
    else:
        long_first = sorted(names, key=len, reverse=True)
        name = next((each for each in long_first if metric.startswith(f"tasks.{each}.")), None)
        if name is None:
            return f"the run's tasks are {', '.join(names)}; as tasks.{names[0]}.final.value"
        *above, last = metric.removeprefix(f"tasks.{name}.").split(".")
    if last not in _TASK_PARTS:
        return f"it is no number; as tasks.{names[0]}.final.value"
    return why_not(".".join((*above, "loss", *(["value"] if above[:1] == ["comparisons"] else []))), kind)


def _reason(metric: str, why: Mapping[str, str]) -> str:
    parts = metric.split(".")
    above = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((why[key] for key in above if key in why), "not measured in such a run")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not isinstance(value, dict):
            yield f"{prefix}{key}", value
        elif f"{prefix}{key}" not in _APART:
            yield from _leaves(value, f"{prefix}{key}.")
