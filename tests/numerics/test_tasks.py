"""lm-eval's results against log-likelihoods and generations computed by hand, on a quantised model; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import find_target
from tiny_models import tiny_model

from quantize.convert import quantise_
from quantize.errors import UserError
from quantize.layers import select_layers
from quantize.schemes import SCHEMES
from quantize.tasks import (
    RELEASE13,
    Row,
    Settings,
    check_names,
    count_samples,
    definition_key,
    expand,
    fingerprint,
    load_rows,
    load_tasks,
    run_tasks,
    save_rows,
    transformers_lm,
)
from train.models import byte_tokenizer

ROWS = [
    {"question": f"spell {word}", "choices": [" ".join(word), " ".join(reversed(word)), word], "answer": number % 2}
    for number, word in enumerate(("cat", "stone", "river", "ox", "window"))
]
COMMON = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
PROMPT = "Q: {{question}}\nA:"
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": PROMPT,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "writes": {
        "output_type": "generate_until",
        "doc_to_text": PROMPT,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files with their rows beside them."""
    home = tmp_path_factory.mktemp("tasks")
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        (home / f"{name}.yaml").write_text(json.dumps({"task": name, **COMMON, **task}))  # JSON is YAML
    return home


def _model(scheme: str | None) -> Any:
    model = tiny_model(vocab_size=len(byte_tokenizer()))
    if scheme is not None:
        target = find_target(scheme, "cpu")
        coverage = select_layers(model, SCHEMES[scheme], 32, target)
        quantise_(model, SCHEMES[scheme], target, 32, coverage)
    return model


def _settings(folder: Path, *names: str, **changes: Any) -> Settings:
    return Settings(names=[str(folder / f"{name}.yaml") for name in names], batch_size=3, **changes)


@torch.no_grad()
def _log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> float:
    ids = torch.tensor([prompt + answer])
    log_probs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.double(), -1)[0]
    return sum(float(log_probs[len(prompt) + number - 1, token]) for number, token in enumerate(answer))


@pytest.mark.parametrize("scheme", [None, "int8-int4", "int3"])
def test_results_equal_log_likelihoods_and_generations_computed_by_hand(scheme: str | None, folder: Path) -> None:
    model, tokenizer = _model(scheme), byte_tokenizer()
    settings = _settings(folder, "choices", "writes", "text")
    rows = run_tasks(transformers_lm(model, tokenizer), load_tasks(settings), settings)
    by_task = {name: [row for row in rows if row.name == name] for name in TASKS}
    assert all([row.doc_id for row in found] == list(range(len(ROWS))) for found in by_task.values())
    for number, row in enumerate(ROWS):
        prompt = tokenizer.encode(f"Q: {row['question']}\nA:")
        choices = [_log_likelihood(model, prompt, tokenizer.encode(f" {choice}")) for choice in row["choices"]]
        best = max(range(3), key=choices.__getitem__)
        chosen = by_task["choices"][number]
        assert chosen.value == float(best == row["answer"])
        assert chosen.target == f" {row['choices'][row['answer']]}"
        text, _, value = chosen.response.rpartition(" (")
        assert text == f" {row['choices'][best]}" and float(value.rstrip(")")) == pytest.approx(choices[best], abs=2e-3)

        written = list(prompt)
        for _ in range(6):
            logits = model(input_ids=torch.tensor([written]), use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
        expected = tokenizer.decode(written[len(prompt) :], skip_special_tokens=True).split("\n")[0]
        assert by_task["writes"][number].response == expected
        assert by_task["writes"][number].value == float(expected == row["choices"][row["answer"]])

        ids = tokenizer.encode(row["question"])
        read = by_task["text"][number]
        assert read.value == pytest.approx(-_log_likelihood(model, [tokenizer.eos_token_id], ids), rel=1e-5)
        assert (read.metric, read.weight, read.higher_is_better) == ("nats per word", 2.0, False)


def test_log_likelihoods_of_a_model_in_16_bit_are_summed_in_32(folder: Path) -> None:
    model, tokenizer = _model(None).to(torch.bfloat16), byte_tokenizer()
    settings = replace(_settings(folder, "text"), batch_size=1)
    for row, read in zip(
        ROWS, run_tasks(transformers_lm(model, tokenizer), load_tasks(settings), settings), strict=True
    ):
        ids = tokenizer.encode(row["question"])
        # In bfloat16 a sum of 100 nats is known to half a nat.
        assert read.value == pytest.approx(-_log_likelihood(model, [tokenizer.eos_token_id], ids), abs=2e-3)


def test_a_quantised_model_gives_other_log_likelihoods(folder: Path) -> None:
    settings = _settings(folder, "text")
    values = [
        [
            row.value
            for row in run_tasks(transformers_lm(_model(scheme), byte_tokenizer()), load_tasks(settings), settings)
        ]
        for scheme in (None, "int3")
    ]
    assert all(a != b for a, b in zip(*values, strict=True))


def test_few_shot_limit_and_chat_template_change_the_prompt(folder: Path) -> None:
    model, tokenizer = _model(None), byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    settings = _settings(folder, "choices", limit=2, num_fewshot=1, chat_template=True)
    tasks = load_tasks(settings)
    assert count_samples(tasks["choices"], 2) == 2
    rows = run_tasks(transformers_lm(model, tokenizer), tasks, settings)
    assert len(rows) == 2
    assert rows[0].prompt.count("[user]") == 2 and rows[0].prompt.count("[assistant]") == 1
    plain = run_tasks(
        transformers_lm(model, tokenizer),
        load_tasks(replace(settings, num_fewshot=None)),
        replace(settings, num_fewshot=None),
    )
    assert plain[0].prompt == "[user]Q: spell cat\nA:"


def test_rows_survive_the_file(folder: Path, tmp_path: Path) -> None:
    settings = _settings(folder, "choices", "text")
    rows = run_tasks(transformers_lm(_model(None), byte_tokenizer()), load_tasks(settings), settings)
    rows.append(Row("x", "x", 0, "h", None, None, 1.0, True, "p\n", "ü", ""))
    save_rows(rows, tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet") == rows


def test_the_fingerprint_follows_samples_settings_and_definition(folder: Path, tmp_path: Path) -> None:
    def of(home: Path, **changes: Any) -> str:
        settings = _settings(home, "choices", **changes)
        return fingerprint(load_tasks(_settings(home, "choices")), settings)

    first = of(folder)
    assert of(folder) == first and of(folder, limit=3) != first and of(folder, seed=1) != first
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"answer": 1}) + "\n" for row in ROWS))
    (tmp_path / "choices.yaml").write_text((folder / "choices.yaml").read_text())
    assert of(tmp_path) != first


def test_where_a_task_lies_is_no_part_of_it_but_what_lies_beside_it_is(folder: Path, tmp_path: Path) -> None:
    homes = tmp_path / "here", tmp_path / "there"
    for home in homes:
        home.mkdir()
        for name in ("choices.yaml", "rows.jsonl"):
            (home / name).write_bytes((folder / name).read_bytes())
    settings = [_settings(home, "choices") for home in homes]
    assert len({fingerprint(load_tasks(each), each) for each in settings}) == 1
    keys = [definition_key(each.names) for each in settings]
    assert keys[0] == keys[1]
    (homes[0] / "scoring.py").write_text("raise SystemExit('code of a task is not run to look at it')")
    assert definition_key(settings[0].names) != keys[1]


def test_rows_of_several_files_are_named_by_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "parts").mkdir(parents=True)
    (tmp_path / "parts").mkdir()
    for number, row in enumerate(ROWS):
        (home / "parts" / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "parts" / "other.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    monkeypatch.chdir(tmp_path)
    task = {"task": "choices", **COMMON, **TASKS["choices"]}
    task["dataset_kwargs"] = {"data_files": {"test": "parts/*.jsonl"}}
    (home / "choices.yaml").write_text(json.dumps(task))
    (found,) = load_tasks(_settings(home, "choices"))["choices"].values()
    assert [row["question"] for row in found.eval_docs] == [row["question"] for row in ROWS]


def test_a_second_try_with_a_smaller_batch_draws_the_same_examples(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator

    settings = replace(_settings(folder, "choices", num_fewshot=2), batch_size=4)
    whole = run_tasks(transformers_lm(_model(None), byte_tokenizer()), load_tasks(settings), settings)
    evaluate, tried = lm_eval.evaluator.evaluate, []

    def short_of_memory(lm: Any, *args: Any, **options: Any) -> Any:
        tried.append(lm.batch_size_per_gpu)
        result = evaluate(lm, *args, **options)
        if lm.batch_size_per_gpu == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", short_of_memory)
    again = run_tasks(transformers_lm(_model(None), byte_tokenizer()), load_tasks(settings), settings)
    assert tried == [4, 2] and [row.prompt for row in again] == [row.prompt for row in whole]


@pytest.mark.parametrize("text", ["task: [", "dataset_kwargs:", "- choices"])
def test_a_broken_file_of_a_task_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "choices.yaml").write_text(text)
    with pytest.raises(UserError, match=r"eval\.tasks: choices cannot be loaded: "):
        definition_key([str(tmp_path / "choices.yaml")])


def test_all_13_tasks_of_the_releases_are_known_without_a_network() -> None:
    check_names(["release13"])
    assert list(expand(["release13"])) == list(RELEASE13) and len(RELEASE13) == 13
    assert expand(["siqa"]) == {"siqa": "social_iqa"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["gsm9k"], "lm-eval has no task gsm9k; did you mean gsm8k"),
        (["nowhere/task.yaml"], "no file nowhere/task.yaml"),
        (["gsm8k", "release13"], "gsm8k is named twice"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_loaded(names: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_names(names)
    assert said in " ".join(caught.value.lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "cannot be loaded"),
        ({"dataset_kwargs": {"data_files": {"test": "empty.jsonl"}}}, "choices"),
        ({"task": None}, "has no `task: NAME`"),
        ({"output_type": "sings"}, "cannot be loaded"),
        ({"unsafe_code": True}, "runs code that the model writes"),
    ],
)
def test_a_task_that_cannot_run_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "choices.yaml").write_text(json.dumps({"task": "choices", **COMMON, **TASKS["choices"], **change}))
    with pytest.raises(UserError) as caught:
        load_tasks(_settings(tmp_path, "choices"))
    assert said in " ".join(caught.value.lines) and "choices" in " ".join(caught.value.lines)
