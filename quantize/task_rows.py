"""One model's result on every sample of a task, from lm-eval's samples, and the parquet file that keeps them."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PREFERENCES, REWARDS = "preferences", "rewards"
OWN = {
    PREFERENCES: "the share of the held-out pairs whose better answer is the more likely one as a whole",
    REWARDS: "the mean reward of greedy answers to held-out prompts",
}
"""Name of the task -> what it is."""
_FILTER = "flexible-extract"  # where a task offers several: what the answer is, not how it is set
_PER_UNIT = {
    "perplexity": "nats per answer",
    "word_perplexity": "nats per word",
    "byte_perplexity": "nats per byte",
    "bits_per_byte": "nats per byte",
}


@dataclass(frozen=True)
class Row:
    """One model's result on one sample of a task.

    Attributes:
        name: the task as the user named it; pools the subtasks of a group that lm-eval pools.
        task: lm-eval's name.
        doc_id: the sample's number in the task, `doc_hash` its content.
        metric: what `value` is; None where the task has no metric that is a number a sample.
        value: the metric, or nats where `weight` is not 1; NaN where the model's numbers overflow.
        weight: what the value is per: 1, or the words or bytes of a text.
        prompt, target, response: as text; of a choice, the response is the choice and its log-likelihood.
        others: the task's other metrics of the sample as JSON, {metric: value}; null where the numbers overflow.
    """

    name: str
    task: str
    doc_id: int
    doc_hash: str
    metric: str | None
    value: float | None
    weight: float
    higher_is_better: bool
    prompt: str
    target: str
    response: str
    others: str = "{}"


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Writes a parquet file with a column for each field of `Row`; `load_rows` reads it back."""
    import pyarrow
    import pyarrow.parquet

    types = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_()}
    schema = pyarrow.schema(
        [(name, types[str(field.type).split(" ")[0]]) for name, field in Row.__dataclass_fields__.items()]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two runs may fill one cache
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=schema), temporary)
    temporary.replace(path)


def load_rows(path: Path) -> list[Row]:
    """Reads what `save_rows` wrote, in an earlier version without `others`, too."""
    import pyarrow.parquet

    return [Row(**row) for row in pyarrow.parquet.read_table(path).to_pylist()]


def own_rows_path(scores: Path) -> Path:
    """Where the rows of `OWN` lie, beside the scores of an arm."""
    return scores.with_suffix(".method.parquet")


def chosen_filter(names: Sequence[str]) -> str:
    """Which of a task's filters gives the result that is kept."""
    return _FILTER if _FILTER in names else names[0]


def may_be_split(tasks: Mapping[str, Any]) -> bool:
    """May the tasks of one name measure different things, so that each is reported by itself? Known once they ran."""
    kinds = {(type(task), task.OUTPUT_TYPE, *task.higher_is_better().items()) for task in tasks.values()}
    return len(kinds) > 1


def rows_of(name: str, leaf: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The rows of one task.

    Args:
        name: what it is reported under.
        leaf: lm-eval's name of it.
        samples: as lm-eval logs them, one for each document and filter.
    """
    chosen = chosen_filter(list(dict.fromkeys(str(sample["filter"]) for sample in samples)))
    shown = [sample for sample in samples if sample["filter"] == chosen]
    directions = task.higher_is_better()
    every = list(dict.fromkeys(metric for sample in shown for metric in sample["metrics"]))
    measured = {metric: [_measured(metric, sample.get(metric)) for sample in shown] for metric in every}
    listed = [metric for metric in directions if metric in shown[0]["metrics"]] or shown[0]["metrics"]
    metric = next((metric for metric in listed if None not in measured[metric]), None)
    better = metric not in _PER_UNIT and directions.get(metric) is not False
    for number, sample in enumerate(shown):
        overflows = _overflows(sample)
        value, weight = (None, 1.0) if metric is None else measured[metric][number] or (None, 1.0)
        others = {other: results[number] for other, results in measured.items() if other != metric}
        yield Row(
            name=name,
            task=leaf,
            doc_id=int(sample["doc_id"]),
            doc_hash=str(sample["doc_hash"]),
            metric=None if metric is None else _PER_UNIT.get(metric, metric),
            value=math.nan if overflows and metric is not None else value,
            weight=weight,
            higher_is_better=better,
            prompt=str(sample["arguments"][0][0]),
            target=_target(sample["target"], sample["arguments"]),
            response=_response(sample),
            others=_as_json(others, overflows),
        )


def _measured(metric: str, result: Any) -> tuple[float, float] | None:
    """(value, weight) of a sample, None where the metric exists of the whole task only (bleu, a corpus's f1)."""
    try:
        if metric == "perplexity":  # lm-eval's name for the answer's log-likelihood
            return -float(result), 1.0
        if metric in _PER_UNIT:
            log_likelihood, weight = result
            return -float(log_likelihood), float(weight)
        return float(result), 1.0
    except (TypeError, ValueError):
        return None


def _overflows(sample: Mapping[str, Any]) -> bool:
    """Is any log-likelihood no number? lm-eval's argmax takes NaN for the largest, and scores it as a choice."""
    for repeats in sample["resps"]:
        for response in repeats:
            said = response[0] if isinstance(response, (tuple, list)) else response
            if isinstance(said, numbers.Real) and not math.isfinite(said):
                return True
    return False


def _as_json(others: Mapping[str, tuple[float, float] | None], overflows: bool) -> str:
    """Values per unit, by our names; what is no number of the sample is left out."""
    found: dict[str, float | None] = {}
    for metric, result in others.items():
        if result is not None:
            value = result[0] / result[1] if result[1] else math.nan
            found[_PER_UNIT.get(metric, metric)] = value if math.isfinite(value) and not overflows else None
    return json.dumps(found, allow_nan=False)


def _target(target: Any, arguments: Sequence[Any]) -> str:
    """A choice's number as its text."""
    choice = isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(arguments)
    if choice and len(arguments[target]) > 1 and isinstance(arguments[target][1], str):
        return str(arguments[target][1])
    return str(target)


def _response(sample: Mapping[str, Any]) -> str:
    """What was generated; of a choice the most likely one and its log-likelihood; of a text its log-likelihood."""
    results = [response[0] for response in sample["resps"]]
    if isinstance(results[0], (tuple, list)):
        best = max(range(len(results)), key=lambda index: float(results[index][0]))
        same = len({str(arguments[1]) for arguments in sample["arguments"]}) == 1  # the choice is in the prompt
        said = sample["arguments"][best][0 if same and len(results) > 1 else 1]
        return f"{said} ({float(results[best][0]):.3f})"
    return str(results[0]) if isinstance(results[0], str) else f"{float(results[0]):.3f}"
