"""The contract of metrics.json: every key always exists, and each null has its reason under `why`.

Pure functions of evaluation scores. Losses are in nats per answer token, sizes in MiB, accuracies shares from 0 to 1.
Dotted names (`final.loss`, `size.final_mib`) are the nested keys: a sweep's `metric:`, W&B and the report share them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantize.errors import UserError
from quantize.statistics import (
    FEWEST,
    Interval,
    accuracy_interval,
    loss_interval,
    mcnemar,
    paired_accuracy_difference,
    paired_loss_difference,
    recovered_interval,
    share_interval,
)
from quantize.task_metrics import Rows, task_metrics

ARMS = ("base", "base_quantized", "control", "ptq", "tuned", "final")
COMPARISONS = (
    ("final", "ptq"), ("final", "control"), ("final", "base"), ("final", "tuned"),
    ("ptq", "control"), ("tuned", "base"),
)  # fmt: skip
QUANTISED_ARMS = ("base_quantized", "ptq", "final")  # where the target cannot run, these are simulated
SIZES = ("base_mib", "tuned_mib", "final_mib", "memory_mib", "bits_per_weight")

_NO_INTERVAL = {"low": None, "high": None}
_NO_DIFFERENCE = {"value": None, "low": None, "high": None}
_NOT_MEASURED = "not measured in this run"
_TOO_FEW, _TOO_FEW_DIFFER = "too few samples for an interval", "too few samples differ for an interval"


class ScoresLike(Protocol):
    """What an evaluation leaves for one arm; S samples, the same ones in the same order for every arm."""

    @property
    def nll(self) -> NDArray[np.float64]: ...  # [S] nats, summed over the answer tokens of a sample
    @property
    def tokens(self) -> NDArray[np.int64]: ...  # [S] answer tokens
    @property
    def exact(self) -> NDArray[np.bool_]: ...  # [S] every teacher-forced argmax is right, the end token included
    @property
    def kl(self) -> NDArray[np.float64] | None: ...  # [S] KL(reference || arm) in nats, summed over answer tokens
    @property
    def top1(self) -> NDArray[np.int64] | None: ...  # [S] answer tokens whose argmax is the reference's


Arms = Mapping[str, ScoresLike | None]


def build_metrics(
    *,
    arms: Arms,
    why: Mapping[str, str],
    train_ship_gap: float | None,
    backend_gap: float | None,
    reference: str | None,
    size: Mapping[str, Any],
    coverage: Mapping[str, Any],
    scheme: str | None,
    target: str | None,
    dtype: str,
    simulated: bool,
    missing: Sequence[str] = (),
    finish_command: str | None = None,
    task_rows: Rows | None = None,
    layers: Mapping[str, Mapping[str, float | None]] | None = None,
    cost: Sequence[Mapping[str, Any]] | None = None,
    elsewhere: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that metrics.json holds.

    Args:
        arms: scores by arm name (see `ARMS`); None or absent where the arm was not evaluated.
        why: reasons for what is null, by dotted key; a key speaks for all below it (`control` for `control.loss`).
        train_ship_gap: loss of the final fake-quantised weights in the plain graph minus `final.loss`.
        backend_gap: loss in the training backend's own graph minus that in the plain graph.
        reference: the arm from which the KL divergence and the agreement of ptq and final are measured.
        size: some of `SIZES`.
        coverage: `quantized_fraction` (share of the layers' weights), `share_of_all_weights` (of the model's) and
            `skipped` (layer name: reason).
        scheme, target: as shipped; None where nothing is quantised.
        dtype: of the weights that are not quantised, those of whole arms included ("float32").
        simulated: this machine cannot run the target, so quantised arms come from fake quantisation.
        missing: what keeps this machine from the target, in words.
        finish_command: what completes the run where the target can run.
        task_rows: results on tasks by arm.
        layers: by layer the fields of `quantize.layer_health.LayerHealth`.
        elsewhere: `arms` that were measured on another `device`, in another `dtype` or with other `packages`.
        cost: that of tuned and of what ships (see `quantize.cost.measure_cost`).

    Raises:
        UserError: a loss is not finite, or arms were not run on the same samples of a task.
        ValueError: an unknown arm, size or coverage key, or arms that were not scored on the same samples.
    """
    _check(arms, size, coverage)
    count = next((scores.tokens for scores in arms.values() if scores is not None), None)
    recovered = _recovered(arms)
    tasks, tasks_mean, no_task = task_metrics(task_rows or {}, ARMS, COMPARISONS)
    metrics: dict[str, Any] = {
        "n_samples": None if count is None else len(count),
        "n_tokens": None if count is None else int(np.sum(count)),
        **{name: _arm(name, arms, simulated) for name in ARMS},
        "comparisons": {f"{a}_vs_{b}": _comparison(a, b, arms, simulated) for a, b in COMPARISONS},
        "train_ship_gap": _number(train_ship_gap),
        "backend_gap": _number(backend_gap),
        "recovered": recovered["value"],
        "recovered_interval": {"low": recovered["low"], "high": recovered["high"]},
        "kl": _distribution(arms, reference, simulated),
        "tasks": tasks,
        "tasks_mean": tasks_mean,
        "sqnr": _sqnr(layers or {}),
        "layers": {name: dict(health) for name, health in (layers or {}).items()},
        "size": {key: _number(size.get(key)) for key in SIZES},
        "cost": _cost(cost or ()),
        "coverage": {
            "quantized_fraction": _number(coverage.get("quantized_fraction")),
            "share_of_all_weights": _number(coverage.get("share_of_all_weights")),
            "skipped": dict(coverage.get("skipped") or {}),
        },
        "scheme": scheme,
        "target": target,
        "dtype": dtype,
        "simulated": simulated,
        "missing": list(missing),
        "elsewhere": _elsewhere(elsewhere),
        "finish_command": finish_command,
    }
    metrics["why"] = _reasons(metrics, arms, {**no_task, **why})
    return metrics


def flatten(metrics: Mapping[str, Any]) -> dict[str, float | int | bool | str]:
    """Dotted names of all values that are known: no nulls, no lists, no `why`, nothing by layer."""
    return {
        key: value
        for key, value in _leaves(metrics)
        if value is not None
        and not isinstance(value, list)
        and not key.startswith(("why.", "coverage.skipped.", "layers."))
    }


def unexplained(metrics: Mapping[str, Any]) -> list[str]:
    """Dotted keys that are null although neither they nor a key above them has a reason under `why`."""
    why = metrics.get("why", {})
    return [key for key, value in _leaves(metrics) if value is None and not any(part in why for part in _above(key))]


def _check(arms: Arms, size: Mapping[str, Any], coverage: Mapping[str, Any]) -> None:
    unknown = [
        *(set(arms) - set(ARMS)),
        *(set(size) - set(SIZES)),
        *(set(coverage) - {"quantized_fraction", "share_of_all_weights", "skipped"}),
    ]
    if unknown:
        raise ValueError(f"not in the contract of metrics.json: {', '.join(sorted(unknown))}")
    present = {name: scores for name, scores in arms.items() if scores is not None}
    broken = {name: int((~np.isfinite(scores.nll)).sum()) for name, scores in present.items()}
    if any(broken.values()):
        raise UserError(
            *(
                f"{name}: the loss of {number} of {len(present[name].nll)} evaluation samples is NaN or infinite: "
                "the model's numbers overflow; lower train.learning_rate or set quantize.dtype to float32"
                for name, number in broken.items()
                if number
            )
        )
    tokens = [(name, scores.tokens) for name, scores in present.items()]
    for name, own in tokens[1:]:
        if not np.array_equal(own, tokens[0][1]):
            raise ValueError(f"{name} and {tokens[0][0]} were not scored on the same samples: no paired comparison")


def _arm(name: str, arms: Arms, simulated: bool) -> dict[str, Any]:
    scores, base = arms.get(name), arms.get("base")
    if scores is None:
        empty = {"loss": None, "perplexity": None, "accuracy": None}
        nothing = {"loss": dict(_NO_DIFFERENCE), "accuracy": dict(_NO_DIFFERENCE)}
        intervals = {"loss_interval": dict(_NO_INTERVAL), "accuracy_interval": dict(_NO_INTERVAL)}
        return {**empty, **intervals, "vs_base": nothing, "simulated": False}
    loss, accuracy = loss_interval(scores.nll, scores.tokens).as_dict(), accuracy_interval(scores.exact).as_dict()
    value = float(loss["value"] or 0.0)
    return {
        "loss": value,
        "perplexity": math.exp(value) if value < 700 else None,  # exp overflows beyond 709
        "accuracy": accuracy["value"],
        "loss_interval": {"low": loss["low"], "high": loss["high"]},
        "accuracy_interval": {"low": accuracy["low"], "high": accuracy["high"]},
        "vs_base": _differences(scores, None if name == "base" else base),
        "simulated": simulated and name in QUANTISED_ARMS,
    }


def _differences(a: ScoresLike | None, b: ScoresLike | None) -> dict[str, Any]:
    if a is None or b is None:
        return {"loss": dict(_NO_DIFFERENCE), "accuracy": dict(_NO_DIFFERENCE)}
    return {
        "loss": paired_loss_difference(a.nll, b.nll, a.tokens).as_dict(),
        "accuracy": paired_accuracy_difference(a.exact, b.exact).as_dict(),
    }


def _comparison(a: str, b: str, arms: Arms, simulated: bool) -> dict[str, Any]:
    first, second = arms.get(a), arms.get(b)
    known = first is not None and second is not None
    return {
        **_differences(first, second),
        "mcnemar_p": mcnemar(first.exact, second.exact) if first is not None and second is not None else None,
        "simulated": simulated and known and bool({a, b} & set(QUANTISED_ARMS)),
    }


def _distribution(arms: Arms, reference: str | None, simulated: bool) -> dict[str, Any]:
    """How far the next-token distributions of the quantised arms are from the reference's, on answer tokens."""
    found: dict[str, Any] = {"reference": reference, "simulated": False}
    for name in ("ptq", "final"):
        scores = arms.get(name)
        kl, top1 = (None, None) if scores is None or reference is None else (scores.kl, scores.top1)
        known = scores is not None and kl is not None and top1 is not None
        interval = loss_interval(kl, scores.tokens) if known else None  # type: ignore[union-attr,arg-type]
        agreement = share_interval(top1, scores.tokens) if known else None  # type: ignore[union-attr,arg-type]
        found[name] = None if interval is None else _number(interval.value)
        found[f"{name}_interval"] = _not_below_zero(_bounds(interval))
        found[f"{name}_top1"] = None if agreement is None else _number(agreement.value)
        found[f"{name}_top1_interval"] = _bounds(agreement)
        found["simulated"] = found["simulated"] or (simulated and known)
    return found


def _elsewhere(known: Mapping[str, Any] | None) -> dict[str, Any]:
    known = known or {"arms": (), "device": None, "dtype": None, "packages": {}}
    return {**known, "arms": list(known["arms"]), "packages": dict(known["packages"])}


def _cost(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """tuned, what ships, and how many times faster that is (memory: its share)."""
    if len(measured) != 2:
        return {"tuned": None, "final": None, "ratio": None}
    tuned, final = measured
    return {"tuned": dict(tuned), "final": dict(final), "ratio": _ratios(tuned, final)}


def _ratios(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How many times faster `other` is than `base`, and its memory as a share of it."""
    peaks = other["peak_mib"], base["peak_mib"]
    return {
        "prefill_tokens_per_s": other["prefill_tokens_per_s"] / base["prefill_tokens_per_s"],
        "decode_ms": {batch: base["decode_ms"][batch] / time_ for batch, time_ in other["decode_ms"].items()},
        "peak_mib": peaks[0] / peaks[1] if None not in peaks else None,
    }


def _bounds(interval: Interval | None) -> dict[str, float | None]:
    return dict(_NO_INTERVAL) if interval is None else {key: interval.as_dict()[key] for key in ("low", "high")}


def _not_below_zero(bounds: dict[str, float | None]) -> dict[str, float | None]:
    """For a divergence, which cannot be."""
    return {key: None if bound is None else max(bound, 0.0) for key, bound in bounds.items()}


def _sqnr(layers: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """The layers' output SQNR in short: decibels, and the name of the worst."""
    known = {name: float(health["sqnr_db"]) for name, health in layers.items() if health["sqnr_db"] is not None}
    worst = min(known, key=known.__getitem__, default=None)
    return {
        "median_db": float(np.median(list(known.values()))) if known else None,
        "worst_db": None if worst is None else known[worst],
        "worst_layer": worst,
    }


def _recovered(arms: Arms) -> dict[str, float | None]:
    ptq, final, control = (arms.get(name) for name in ("ptq", "final", "control"))
    if ptq is None or final is None or control is None or float(ptq.nll.sum()) <= float(control.nll.sum()):
        return dict(_NO_DIFFERENCE)  # where quantisation cost nothing, there is nothing to recover
    return recovered_interval(ptq.nll, final.nll, control.nll, ptq.tokens).as_dict()


def _reasons(metrics: Mapping[str, Any], arms: Arms, why: Mapping[str, str]) -> dict[str, str]:
    """The caller's reasons, then what follows from the data, for exactly the keys that are null."""
    reasons = {**_default_reasons(metrics, arms, why), **why}
    nulls = [key for key, value in _leaves(metrics) if value is None]
    for key in nulls:
        if not any(part in reasons for part in _above(key)):
            reasons[key] = _unbounded(metrics, key) if key.endswith((".low", ".high")) else _NOT_MEASURED
    return {key: text for key, text in reasons.items() if any(key in _above(null) for null in nulls)}


def _unbounded(metrics: Mapping[str, Any], key: str) -> str:
    """Why a known value has no bound: fewer samples than any interval needs, or nearly all of them alike."""
    tasks = (task for name, task in metrics["tasks"].items() if key.startswith(f"tasks.{name}."))
    part = next(tasks, metrics)
    return _TOO_FEW if (part["n_samples"] or 0) < FEWEST else _TOO_FEW_DIFFER


def _default_reasons(metrics: Mapping[str, Any], arms: Arms, why: Mapping[str, str]) -> dict[str, str]:
    absent = [name for name in ARMS if arms.get(name) is None]
    reasons = {name: why.get(name, _NOT_MEASURED) for name in absent}
    reasons["elsewhere"] = "all arms were measured on one machine"
    reasons["base.vs_base"] = "base is what the others are compared with"
    for name in ARMS:
        reasons[f"{name}.perplexity"] = reasons.get(name, "exp(loss) is beyond what a number holds")
        if name != "base" and name not in absent and "base" in absent:
            reasons[f"{name}.vs_base"] = f"base: {reasons['base']}"
    for a, b in COMPARISONS:
        gone = [name for name in (a, b) if name in absent]
        if gone:
            reasons[f"comparisons.{a}_vs_{b}"] = "; ".join(f"{name}: {reasons[name]}" for name in gone)
    gone = [name for name in ("ptq", "final", "control") if name in absent]
    if gone:
        reasons["recovered"] = "; ".join(f"{name}: {reasons[name]}" for name in gone)
    elif metrics["recovered"] is None:
        reasons["recovered"] = "quantising the control cost no loss on these samples: there is nothing to recover"
    unclear = "the loss that quantisation costs is not clearly above 0: the share has no bounds"
    if not gone and metrics["final"]["loss_interval"]["low"] is None:
        unclear = _TOO_FEW
    reasons["recovered_interval"] = reasons.get("recovered", unclear)
    if metrics["scheme"] is None:
        nothing = "nothing is quantised: neither qat nor quantize.scheme is set"
        shares = ("coverage.quantized_fraction", "coverage.share_of_all_weights")
        reasons |= dict.fromkeys(("scheme", "target", "train_ship_gap", *shares), nothing)
    if not metrics["finish_command"]:
        reasons["finish_command"] = "nothing is left to do"
    for name in ("ptq", "final"):
        if metrics["kl"][name] is None:
            reason = reasons.get(name, _NOT_MEASURED)
            reasons |= {f"kl.{name}{part}": reason for part in ("", "_interval", "_top1", "_top1_interval")}
    if metrics["kl"]["reference"] is None:
        reasons["kl.reference"] = reasons.get("final", _NOT_MEASURED)
    quantised = (
        "this layer's output is equal to the last bit, or all zero"
        if metrics["layers"]
        else reasons.get("final", _NOT_MEASURED)
    )
    reasons |= {"sqnr": quantised, "layers": quantised}
    untold = "this system does not tell a process's peak"
    reasons |= {
        "cost": reasons.get("final", _NOT_MEASURED),
        "cost.tuned.peak_mib": untold,
        "cost.final.peak_mib": untold,
    }
    reasons["cost.ratio.peak_mib"] = untold
    if metrics["simulated"]:
        reasons["cost"] = "what ships does not run on this machine"
    for part in ("tasks_mean", *(f"tasks.{name}" for name in metrics["tasks"])):
        reasons |= {f"{part}.{arm}": reasons[arm] for arm in absent}
        for a, b in COMPARISONS:
            if {a, b} & set(absent):
                reasons[f"{part}.comparisons.{a}_vs_{b}"] = reasons[f"comparisons.{a}_vs_{b}"]
    if metrics["simulated"]:
        written = "quantized/ is not written on this machine: the target does not run here"
        reasons |= dict.fromkeys((f"size.{key}" for key in ("final_mib", "memory_mib", "bits_per_weight")), written)
    return reasons


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _above(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _number(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"metrics.json holds finite numbers only, got {value}")
    return None if value is None else float(value)
