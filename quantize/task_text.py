"""A benchmark's own samples as calibration text; those are left out of its evaluation (`tasks.Settings.left_out`)."""

from __future__ import annotations

from typing import Any

from quantize.errors import UserError
from quantize.evaluate import Sample
from quantize.task_files import PREFIX

_LONGEST = 512  # tokens of a sample: its end is kept


def task_samples(name: str, tokenizer: Any, count: int) -> list[Sample]:
    """The last `count` samples of a task as text: the prompt without examples, and the right answer.

    The last, as `eval.limit` evaluates the first.

    Raises:
        UserError: the name is no single task, or it has no more samples than these.
    """
    from quantize.tasks import Settings, load_tasks

    found = [task for leaves in load_tasks(Settings([name])).values() for task in leaves.values()]
    if len(found) != 1:
        raise UserError(f"calibration data {PREFIX}{name}: it stands for {len(found)} tasks; name one of them")
    task, documents = found[0], list(found[0].eval_docs)
    if len(documents) <= count:
        raise UserError(
            f"calibration data {PREFIX}{name}: {count} samples would leave nothing to evaluate of its "
            f"{len(documents)}; calibrate with fewer"
        )
    samples = []
    for document in documents[-count:]:
        prompt, answer = _parts(task, document)
        given = tokenizer.encode(prompt) if prompt else []
        said = tokenizer.encode(answer, add_special_tokens=not prompt)
        ids = [*given, *said][-_LONGEST:]
        if len(ids) > 1:
            samples.append(Sample(ids, [0] + [1] * (len(ids) - 1)))
    return samples


def _parts(task: Any, document: Any) -> tuple[str, str]:
    """(prompt, right answer with what lies between both) of a document; a text alone has no prompt."""
    from lm_eval.utils import apply_template

    target = task.doc_to_target(document)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "", str(target)
    prompt = task.doc_to_text(document)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(document)
        if isinstance(prompt, int):  # the choice is in the prompt, and one answer follows them all
            prompt = choices[prompt]
        elif isinstance(target, int):
            target = choices[target]
    if isinstance(target, list):  # several right answers, or one that is written like a list
        written = task.config.doc_to_target
        templated = isinstance(written, str) and "{{" in written
        target = apply_template(written, document) if templated else target[0] if target else ""
    return str(prompt), f"{task.get_config('target_delimiter') or ''}{target}"
