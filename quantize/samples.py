"""The samples that quantisation hurt most, side by side: for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from quantize.evaluate import Scores
    from quantize.tasks import Row

HELD_OUT = "held-out"
_OF_HELD_OUT = 5
_EACH_TASK = 2
_LONGEST = 600  # characters of a text that a report shows; the parquet files hold all


@dataclass(frozen=True)
class Side:
    """What one arm did with a sample: its loss (held-out) or its result (task), and the text that it gave."""

    arm: str
    value: float
    text: str


@dataclass(frozen=True)
class WorstSample:
    """One sample on which the shipped model lost most against 16 bit.

    Attributes:
        where: "held-out" or the task's name; `number` is the sample's there.
        unit: of the sides' values.
    """

    where: str
    number: int
    prompt: str
    answer: str
    unit: str
    sides: Sequence[Side]


def worst_samples(folder: Path, arms: Mapping[str, Scores], tasks: Mapping[str, Sequence[Row]]) -> list[WorstSample]:
    """The largest losses of final against control (else tuned), held-out and by task; none without a shipped model.

    Args:
        folder: holds <arm>.parquet as `Scores.save` wrote it, texts included.
        arms: scores by arm.
        tasks: results on tasks by arm.
    """
    reference = "control" if "control" in arms else "tuned"
    if "final" not in arms or reference not in arms:
        return []
    shown = [arm for arm in (reference, "ptq", "final") if arm in arms]
    return [*_held_out(folder, arms, reference, shown), *_of_tasks(tasks, reference, shown)]


def _held_out(folder: Path, arms: Mapping[str, Scores], reference: str, shown: Sequence[str]) -> list[WorstSample]:
    from quantize.evaluate import read_texts

    texts = {arm: read_texts(folder / f"{arm}.parquet") for arm in shown}
    if not all(texts.values()):
        return []
    worse = arms["final"].nll - arms[reference].nll
    chosen = [int(index) for index in np.argsort(-worse, kind="stable")[:_OF_HELD_OUT] if worse[index] > 0]
    return [
        WorstSample(
            where=HELD_OUT,
            number=index,
            prompt=_short(texts["final"]["prompt"][index]),
            answer=_short(texts["final"]["answer"][index]),
            unit="nats",
            sides=[Side(arm, float(arms[arm].nll[index]), _short(texts[arm]["greedy_text"][index])) for arm in shown],
        )
        for index in chosen
    ]


def _of_tasks(tasks: Mapping[str, Sequence[Row]], reference: str, shown: Sequence[str]) -> list[WorstSample]:
    if "final" not in tasks or reference not in tasks:
        return []
    found: dict[str, list[tuple[float, int]]] = {}
    for index, (final, before) in enumerate(zip(tasks["final"], tasks[reference], strict=True)):
        if final.value is not None and before.value is not None and final.weight > 0:  # an empty text weighs nothing
            loss = (before.value - final.value) / final.weight * (1 if final.higher_is_better else -1)
            if loss > 0:
                found.setdefault(final.name, []).append((loss, index))
    chosen = [index for each in found.values() for _, index in sorted(each, key=lambda pair: -pair[0])[:_EACH_TASK]]
    shown = [arm for arm in shown if arm in tasks]  # an arm that overflows on tasks only has no rows
    return [
        WorstSample(
            where=tasks["final"][index].task,
            number=tasks["final"][index].doc_id,
            prompt=_short(tasks["final"][index].prompt),
            answer=_short(tasks["final"][index].target),
            unit=tasks["final"][index].metric or "",
            sides=[
                Side(
                    arm,
                    float(tasks[arm][index].value or 0.0) / tasks[arm][index].weight,
                    _short(tasks[arm][index].response),
                )
                for arm in shown
            ],
        )
        for index in chosen
    ]


def _short(text: str) -> str:
    """The end of a long text: that of a prompt holds the question, after the few-shot examples."""
    return text if len(text) <= _LONGEST else f"[...] {text[-_LONGEST:]}"
