"""Benchmarks through lm-eval: which tasks a name stands for, and a model's result on every sample of them.

Nothing here aggregates: what is kept is one row a sample, so that arms can be compared in pairs
(`quantize.task_metrics`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantize.errors import UserError
from quantize.task_checks import check_kind
from quantize.task_files import (
    RELEASE13,
    check_names,
    definition_key,
    expand,
    fingerprint,
    is_file,
    local_definition,
    open_manager,
    require_lm_eval,
    unloadable,
)
from quantize.task_rows import Row, chosen_filter, load_rows, may_be_split, rows_of, save_rows

__all__ = [
    "RELEASE13",
    "Row",
    "Settings",
    "check_names",
    "count_samples",
    "definition_key",
    "expand",
    "few_shot_numbers",
    "fingerprint",
    "is_file",
    "load_rows",
    "load_tasks",
    "require_lm_eval",
    "run_tasks",
    "save_rows",
    "transformers_lm",
]

_LARGEST_BATCH = 64  # to begin with on CUDA; halved while memory does not suffice


@dataclass(frozen=True)
class Settings:
    """How tasks are run, under lm-eval's own names.

    Attributes:
        names: as the user wrote them.
        num_fewshot: examples in the prompt; None = what the task says.
        limit: the first so many samples of each task; None = all.
        chat_template: put prompts into the model's chat template.
        batch_size: rows at once; None = as many as fit, found by trying (CUDA), or 8 (CPU). Not read by a server.
        seed: of the choice of few-shot examples.
        left_out: task -> how many of its last samples are not run, as they calibrated a model (`quantize.task_text`).
    """

    names: Sequence[str]
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    batch_size: int | None = None
    seed: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


def load_tasks(settings: Settings) -> dict[str, dict[str, Any]]:
    """lm-eval's tasks by reported name, then by lm-eval's name, with data and settings.

    The tasks of a tag, and of a group of which lm-eval gives no mean over all samples, are reported by themselves.

    Raises:
        UserError: a task cannot be loaded, is empty, or runs code that the model writes.
    """
    expanded = expand(settings.names)
    manager = open_manager(expanded)
    found: dict[str, dict[str, Any]] = {}
    left_out = {spec: count for each, count in settings.left_out.items() for spec in expand([each]).values()}
    for name, spec in expanded.items():
        random.seed(settings.seed)  # some tasks shuffle their choices when they are loaded
        np.random.seed(settings.seed)  # noqa: NPY002  it is theirs to draw from
        try:
            loaded = manager.load([local_definition(Path(spec)) if is_file(spec) else spec])
        except Exception as error:  # lm-eval and datasets raise whatever the task's file, its code or the network does
            raise unloadable(name, error) from error
        for leaf, task in loaded["tasks"].items():
            check_kind(leaf, task)
            _set_few_shot(task, settings)
            _leave_out(task, left_out.pop(leaf, 0) + left_out.pop(spec, 0))
        for shown, leaves in _by_reported_name(name, loaded, tag=spec in manager.all_tags).items():
            if shown in found:
                raise UserError(f"eval.tasks: two tasks would be reported as {shown}; name one, or rename its file")
            found[shown] = leaves
    all_leaves = [leaf for tasks in found.values() for leaf in tasks]
    twice = sorted({leaf for leaf in all_leaves if all_leaves.count(leaf) > 1})
    if twice:
        raise UserError(f"eval.tasks: {', '.join(twice)} would run twice, by itself and in a group; name it once")
    return found


def _leave_out(task: Any, count: int) -> None:
    """Takes the last samples from a task, for whoever asks for its documents from here on."""
    if not count:
        return
    documents = task.eval_docs
    rest = documents.select(range(len(documents) - count)) if hasattr(documents, "select") else documents[:-count]
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: rest)


def _set_few_shot(task: Any, settings: Settings) -> None:
    """As lm-eval does: a 0 in a task's definition means that it must have none, whatever is asked for."""
    asked, own = settings.num_fewshot, task.get_config("num_fewshot")
    number = own or 0 if asked is None or own == 0 else asked
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        number = 0  # it is a text without a prompt: lm-eval draws examples for it and drops them
    task.set_config(key="num_fewshot", value=number)
    task.set_fewshot_seed(seed=settings.seed)


def few_shot_numbers(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, int | str]:
    """Examples in the prompts of each reported name, which `Settings.num_fewshot` is not for all.

    Returns:
        the number; "0 or 5" for a group whose tasks differ. Where a group may be reported as its tasks, which is known
        once they ran, both it and they are named: whoever shows this leaves out what has no rows.
    """
    found: dict[str, int | str] = {}
    for name, leaves in tasks.items():
        own = {leaf: int(task.get_config("num_fewshot")) for leaf, task in leaves.items()}
        numbers = sorted(set(own.values()))
        found[name] = numbers[0] if len(numbers) == 1 else " or ".join(map(str, numbers))
        if may_be_split(leaves):
            found = {**own, **found}
    return found


def _by_reported_name(name: str, loaded: Mapping[str, Any], *, tag: bool) -> dict[str, dict[str, Any]]:
    """What `TaskManager.load` gave for one name, split as it is reported."""
    tasks: Mapping[str, Any] = loaded["tasks"]
    groups = list(loaded.get("groups", {}).values())
    if not groups:
        return {leaf: {leaf: task} for leaf, task in tasks.items()} if tag else {name: dict(tasks)}
    parts = _parts(groups[0])  # the one that was asked for; those inside it follow
    return {name: parts[groups[0].name]} if list(parts) == [groups[0].name] else parts


def _parts(item: Any) -> dict[str, dict[str, Any]]:
    """A task or group of lm-eval's by reported name: a group that is not pooled as its members."""
    if not hasattr(item, "get_all_tasks"):
        return {item.task_name: {item.task_name: item}}
    leaves = {task.task_name: task for task in item.get_all_tasks()}
    kept = {(next(iter(task.higher_is_better()), None), _filter_of(task)) for task in leaves.values()}
    if len(kept) == 1 and is_pooled(item.aggregate_metric_list or [], *next(iter(kept))):
        return {item.name: leaves}
    return {name: part for member in item for name, part in _parts(member).items()}


def _filter_of(task: Any) -> str:
    return chosen_filter([each["name"] for each in task.get_config("filter_list") or [{"name": "none"}]])


def is_pooled(aggregated: Sequence[Any], metric: str | None, chosen: str) -> bool:
    """Is lm-eval's number of a group the mean over all samples of its tasks, as ours is?

    Args:
        aggregated: the group's `aggregate_metric_list`; empty = it aggregates nothing.
        metric, chosen: what is kept of its tasks, and the filter that it comes from.
    """
    return any(
        each.metric == metric
        and each.weight_by_size
        and each.aggregation == "mean"
        and (each.filter_list is None or chosen in each.filter_list)
        for each in aggregated
    )


def count_samples(tasks: Mapping[str, Any], limit: int | None) -> int:
    """How many samples of the tasks of one name are run."""
    sizes = [len(task.eval_docs) for task in tasks.values()]
    return sum(size if limit is None else min(size, limit) for size in sizes)


def transformers_lm(model: Any, tokenizer: Any) -> Any:
    """lm-eval's form of a model of transformers, quantised or not."""
    import torch
    from lm_eval.models.huggingface import HFLM

    model.eval()
    head = model.get_output_embeddings().weight
    # Logits are in the model's dtype; a softmax and a sum of hundreds of nats in bfloat16 hide what quantisation costs.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype=torch.float32)
    assert model.get_output_embeddings().weight is head, "lm-eval ties weights anew where the config says tied"
    return lm


def run_tasks(
    lm: Any,
    tasks: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Runs a model on loaded tasks: one row a sample, in the tasks' order.

    Args:
        lm: from `transformers_lm`, or `quantize.serving.tasks.ServedLM`.
        tasks: from `load_tasks`; an evaluation changes them, so load them anew for every model. Subtasks of a group
            whose metrics differ are reported under their own names.
        progress: called with (tasks done, all tasks).
    """
    import torch
    from lm_eval.evaluator import evaluate

    def run(leaves: Mapping[str, Any]) -> Any:
        for task in leaves.values():  # a second try must draw the few-shot examples of the first
            task.set_fewshot_seed(seed=settings.seed)
        with torch.inference_mode():
            return evaluate(
                lm,
                {"tasks": dict(leaves), "groups": {}, "group_map": {}},
                limit=settings.limit,
                bootstrap_iters=0,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )

    found: list[Row] = []
    for done, (name, leaves) in enumerate(tasks.items()):
        if progress is not None:
            progress(done, len(tasks))
        # A server batches by itself, and an error of its memory is no reason to ask it for less.
        result = run(leaves) if getattr(lm, "batches_itself", False) else _in_batches(lm, settings, run, leaves)
        rows = [row for leaf, task in leaves.items() for row in rows_of(name, leaf, task, result["samples"][leaf])]
        pooled = len({(row.metric, row.higher_is_better) for row in rows}) == 1
        found += rows if pooled else [replace(row, name=row.task) for row in rows]
    if progress is not None:
        progress(len(tasks), len(tasks))
    return found


def _in_batches(lm: Any, settings: Settings, run: Callable[[Mapping[str, Any]], Any], leaves: Mapping[str, Any]) -> Any:
    """Runs tasks with as many rows at once as memory takes: the number asked for, or one that is halved until it fits.

    lm-eval's own search tries the model's longest context, of which a task needs a hundredth.
    """
    from accelerate.utils import find_executable_batch_size

    def attempt(batch_size: int) -> Any:
        lm.batch_size_per_gpu = batch_size
        return run(leaves)

    sizes = [settings.batch_size or (_LARGEST_BATCH if lm.device.type == "cuda" else 8)]
    return find_executable_batch_size(attempt, sizes[0], lambda: _halve(sizes))()


def _halve(sizes: list[int]) -> int:
    """The next batch size to try; accelerate's own takes a tenth off, and a task begins anew with each."""
    sizes.append(sizes[-1] // 2)
    return sizes[-1]
