"""What `quantize eval` found: eval.json and its verdict, from scores. Pure functions; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from quantize.arms import format_difference, format_loss, format_value
from quantize.errors import UserError
from quantize.metrics import ScoresLike
from quantize.statistics import (
    FEWEST,
    Interval,
    accuracy_interval,
    loss_interval,
    mcnemar,
    paired_accuracy_difference,
    paired_loss_difference,
    share_interval,
)
from quantize.task_metrics import Rows, task_metrics
from quantize.verdict import is_shown

FEW_SAMPLES = 30
"""With fewer, intervals are rough."""
_LARGEST = 700.0  # nats; exp overflows beyond 709

Found = dict[str, Any]


def absolute(scores: ScoresLike) -> Found:
    """Loss in nats a token, perplexity and exact answers of one model, each {value, low, high}."""
    loss = loss_interval(scores.nll, scores.tokens).as_dict()
    return {
        "loss": loss,
        "perplexity": {key: _exp(bound) for key, bound in loss.items()},
        "exact": accuracy_interval(scores.exact).as_dict(),
    }


def difference(scores: ScoresLike, reference: ScoresLike, tolerance: float) -> Found:
    """A model minus its reference, paired by sample.

    Args:
        scores: with `kl` and `top1` where they were measured against this reference.
        tolerance: nats a token by which the loss may be above the reference's.

    Returns:
        loss (nats a token), perplexity_ratio, exact, each {value, low, high}; mcnemar_p; kl (nats a token) and top1
        (share of tokens), None where not measured; within_tolerance: whether the loss's whole interval is (True), none
        of it (False), or neither can be said (None).

    Raises:
        UserError: they were not scored on the same samples.
    """
    if not np.array_equal(scores.tokens, reference.tokens):
        raise UserError("the two models were not scored on the same samples, so no pair can be made")
    loss = paired_loss_difference(scores.nll, reference.nll, scores.tokens)
    kl, top1 = scores.kl, scores.top1
    return {
        "loss": loss.as_dict(),
        "perplexity_ratio": {key: _exp(bound) for key, bound in loss.as_dict().items()},
        "exact": paired_accuracy_difference(scores.exact, reference.exact).as_dict(),
        "mcnemar_p": mcnemar(scores.exact, reference.exact),
        "kl": None if kl is None else _not_negative(loss_interval(kl, scores.tokens)),
        "top1": None if top1 is None else share_interval(top1, scores.tokens).as_dict(),
        "within_tolerance": _within(loss, tolerance),
    }


def tasks_found(rows: Rows, references: Sequence[str], model: str = "model") -> Found:
    """Scores on tasks by model, and differences from each reference, as `quantize.task_metrics` gives them.

    Args:
        rows: results by id of those that were run, the model's among them.
        references: ids that it is compared with.

    Returns:
        tasks, tasks_mean and why.
    """
    for name, found in rows.items():
        broken = sorted({row.name for row in found if row.metric and not math.isfinite(_number(row.value))})
        if broken:
            raise UserError(f"{name}: {', '.join(broken)}: the model's numbers overflow; look at its weights")
    known = [each for each in references if each in rows]
    tasks, mean, why = task_metrics(rows, [model, *known], [(model, each) for each in known])
    return {"tasks": tasks, "tasks_mean": mean, "why": why}


def good_enough(found: Mapping[str, Any]) -> bool | None:
    """Against the first reference: the loss is kept and no task is shown to be worse; None = cannot be said."""
    key = next(iter(found["differences"]), None)
    if key is None:
        return None
    kept: bool | None = found["differences"][key]["within_tolerance"]
    return False if _shown(found, key)[1] else kept


def verdict(found: Mapping[str, Any]) -> list[str]:
    """What eval.json shows, one sentence a finding: first whether it is good enough, where there is a reference."""
    name, keys = found["models"]["model"]["name"], list(found["differences"])
    if keys:
        sentences = [_judged(found, keys[0])]
    else:
        sentences = [f"{name} was compared with nothing: what its loss would be without quantisation is not known."]
    for key in keys:
        sentences += [_compared(found, key), *_tasks(found, key)]
    rough = "; with so few of them they are rough" if found["n_samples"] < FEW_SAMPLES else ""
    return [*sentences, f"Intervals are about the choice of the {found['n_samples']} samples{rough}."]


def _judged(found: Mapping[str, Any], key: str) -> str:
    name, reference = found["models"]["model"]["name"], found["models"][key]["name"]
    loss, worse = found["differences"][key]["loss"], _shown(found, key)[1]
    low, high, tolerance = loss["low"], loss["high"], found["tolerance"]
    bound = f"{tolerance:g} nats per token (--tolerance)"
    if worse:
        return f"Not good enough: {name} is worse than {reference} on {', '.join(worse)}."
    if low is None or high is None:
        why = f"{FEWEST} samples or more are needed" if found["n_samples"] < FEWEST else "too few samples differ"
        return f"Not known whether {name} is good enough: there is no interval ({why})."
    if low == high == 0:
        return f"Good enough: {name} gives the same loss as {reference}, sample by sample."
    if high < 0:
        return f"Good enough: the loss of {name} is at least {-high:.4f} below that of {reference}."
    if high <= tolerance:
        return f"Good enough: the loss of {name} is at most {high:.4f} above that of {reference}; allowed were {bound}."
    if low > tolerance:
        return (
            f"Not good enough: the loss of {name} is at least {low:.4f} above that of {reference}, more than {bound}."
        )
    return (
        f"Not shown whether {name} is good enough: its loss is {low:+.4f} to {high:+.4f} from that of {reference}, and "
        f"{bound} lie between. More --samples narrow it."
    )


def _compared(found: Mapping[str, Any], key: str) -> str:
    model, reference, pair = found["models"]["model"], found["models"][key], found["differences"][key]
    loss, ratio = pair["loss"], pair["perplexity_ratio"]["value"]
    if loss["low"] is None or loss["high"] is None:
        words = "a loss without an interval beside that of"
    elif loss["low"] == loss["high"] == 0:
        words = "exactly the loss of"
    else:
        tied = "a loss that these samples cannot tell from that of"
        words = "a lower loss than" if loss["high"] < 0 else "a higher loss than" if loss["low"] > 0 else tied
    text = (
        f"{model['name']} has {words} {reference['name']}: {format_loss(model['loss']['value'])} against "
        f"{format_loss(reference['loss']['value'])}, {format_difference(loss)} nats per token"
    )
    text += f", {ratio:.4g} times its perplexity" if ratio is not None else ""
    if pair["top1"] is not None:
        text += f"; the same most likely token at {format_value(pair['top1'], 1, factor=100)} % of the scored tokens"
    return f"{text}."


def _tasks(found: Mapping[str, Any], key: str) -> Iterator[str]:
    """The tasks that differ by themselves, of all that were looked at."""
    compared, reference = _task_pairs(found, key), found["models"][key]["name"]
    if not compared:
        return
    better, worse = _shown(found, key)
    parts = [f"better on {', '.join(better)}"] * bool(better) + [f"worse on {', '.join(worse)}"] * bool(worse)
    tested = f"{len(compared)} task{'s' * (len(compared) > 1)}"
    said = f"it is {' and '.join(parts)}" if parts else "no difference is shown"
    yield f"Beside {reference}, of {tested}: {said} (intervals without 0, Holm-adjusted p < 0.05)."


def _shown(found: Mapping[str, Any], key: str) -> tuple[list[str], list[str]]:
    """Tasks on which the model is shown to be better than a reference, and worse."""
    clear = {name: each for name, each in _task_pairs(found, key).items() if is_shown(each)}
    better = [name for name, each in clear.items() if (each["value"] > 0) == found["tasks"][name]["higher_is_better"]]
    return better, [name for name in clear if name not in better]


def _task_pairs(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    pairs = {name: task["comparisons"].get(f"model_vs_{key}") for name, task in found["tasks"].items()}
    return {name: pair for name, pair in pairs.items() if pair is not None and pair["value"] is not None}


def _within(loss: Interval, tolerance: float) -> bool | None:
    if not (math.isfinite(loss.low) and math.isfinite(loss.high)):
        return None
    return True if loss.high <= tolerance else False if loss.low > tolerance else None


def _not_negative(divergence: Interval) -> dict[str, float | None]:
    found = divergence.as_dict()
    return {key: bound if bound is None else max(bound, 0.0) for key, bound in found.items()}


def _exp(value: float | None) -> float | None:
    return None if value is None or abs(value) > _LARGEST else math.exp(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
