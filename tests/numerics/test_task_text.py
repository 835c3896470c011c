"""A benchmark's samples as calibration text, and that they are left out of its evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_plain, tiny_model

from quantize.calibrate import Recipe, load_calibration
from quantize.convert import convert_checkpoint
from quantize.errors import UserError
from quantize.folder_eval.models import _left_out
from quantize.record import read_record
from quantize.schemes import find_scheme
from quantize.task_files import fingerprint, task_name
from quantize.task_text import task_samples
from quantize.tasks import Settings, count_samples, load_tasks
from train.models import byte_tokenizer

TASKS = Path(__file__).resolve().parents[2] / "examples" / "tasks"
CHOICES, ANSWERS, PERPLEXITY = (str(TASKS / f"{name}.yaml") for name in ("choices", "answers", "perplexity"))


def documents_of(name: str, **options: Any) -> list[Any]:
    ((_, leaves),) = load_tasks(Settings([name], **options)).items()
    (task,) = leaves.values()
    return list(task.eval_docs)


def test_a_sample_is_a_prompt_and_its_right_answer() -> None:
    tokenizer = byte_tokenizer()
    for name, expected in (
        (CHOICES, lambda d: f"Question: {d['question']}\nAnswer: {d['choices'][d['answer']]}"),
        (ANSWERS, lambda d: f"{d['messages'][0]['content']} {d['messages'][1]['content']}"),
        (PERPLEXITY, lambda d: d["messages"][0]["content"]),
    ):
        samples = task_samples(name, tokenizer, 5)
        texts = [tokenizer.decode(sample.input_ids, skip_special_tokens=True) for sample in samples]
        assert texts == [expected(document)[-512:] for document in documents_of(name)[-5:]]


@pytest.mark.parametrize("name", [CHOICES, ANSWERS, PERPLEXITY])
def test_what_calibrates_is_not_evaluated(name: str) -> None:
    every, rest = documents_of(name), documents_of(name, left_out={name: 7})
    assert rest == every[:-7]
    whole, less = (load_tasks(Settings([name], left_out=left_out)) for left_out in ({}, {name: 7}))
    counts = [count_samples(next(iter(tasks.values())), None) for tasks in (whole, less)]
    assert counts == [len(every), len(every) - 7]
    assert count_samples(next(iter(less.values())), 4) == 4
    keys = [fingerprint(whole, Settings([name])), fingerprint(less, Settings([name], left_out={name: 7}))]
    assert keys[0] != keys[1]
    with pytest.raises(UserError, match="calibrate with fewer"):
        task_samples(name, byte_tokenizer(), len(every))


def test_another_task_keeps_its_samples() -> None:
    assert documents_of(ANSWERS, left_out={CHOICES: 7}) == documents_of(ANSWERS)


def test_a_task_is_named_by_its_prefix() -> None:
    assert task_name("task:arc_easy") == "arc_easy" and task_name("task.jsonl") is None and task_name(None) is None


def test_a_conversion_records_the_task_and_its_evaluation_leaves_the_samples_out(tmp_path: Path) -> None:
    source = save_plain(tiny_model(vocab_size=259), tmp_path / "plain")
    byte_tokenizer().save_pretrained(source)
    scheme = find_scheme("int4")
    recipe = Recipe(algorithms=("gptq",), task=CHOICES, samples=9)
    calibration = load_calibration(recipe, byte_tokenizer())
    assert calibration.about["data"] == f"task:{CHOICES}" and calibration.about["samples"] == 9
    convert_checkpoint(
        source, tmp_path / "out", scheme, scheme.targets["cpu"], group_size=32, dtype="float32", device="cpu",
        recipe=recipe,
    )  # fmt: skip
    assert _left_out(read_record(tmp_path / "out")) == {"left_out": {CHOICES: 9}}
