"""What of a benchmark is refused before a model runs, what is told of it, and what an overflowing model scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import torch
from tiny_models import tiny_model

from quantize.errors import UserError
from quantize.task_checks import check_runnable, context_length
from quantize.task_metrics import task_metrics
from quantize.task_rows import rows_of
from quantize.tasks import Row, Settings, few_shot_numbers, load_rows, load_tasks, run_tasks, save_rows, transformers_lm
from quantize.worker_jobs import check_tasks
from train.models import byte_tokenizer

ROWS = [
    {"question": f"spell {word}", "choices": [" ".join(word), " ".join(reversed(word)), word], "answer": number % 2}
    for number, word in enumerate(("cat", "stone", "river", "ox", "window"))
]
CHOICES: dict[str, Any] = {
    "task": "choices",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
WRITES = {
    "task": "writes",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "doc_to_choice": None,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ROLLING = {
    "task": "text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_choice": None,
    "doc_to_target": "{{question}}",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}


def _write(home: Path, rows: list[dict[str, Any]] | None = None, name: str = "choices", **changes: Any) -> str:
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    task = {key: value for key, value in {**CHOICES, **changes}.items() if value is not None}
    (home / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return str(home / f"{name}.yaml")


def _check(names: list[str], tokenizer: Any = None, context: int = 2048, **changes: Any) -> str:
    """What is refused; empty where nothing is."""
    settings = Settings(names=names, batch_size=3, **changes)
    try:
        check_runnable(load_tasks(settings), settings, tokenizer or byte_tokenizer(), context)
    except UserError as error:
        return "\n".join(error.lines)
    return ""


def _with(number: int, **changes: Any) -> list[dict[str, Any]]:
    return [row | (changes if index == number else {}) for index, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("changes", "gold"),
    [({"answer": 3}, "3"), ({"answer": -1}, "'-1'")],  # lm-eval reads digits as a number, and the rest as text
)
def test_a_right_answer_that_is_no_choice_is_refused(changes: dict[str, Any], gold: str, tmp_path: Path) -> None:
    text = _check([_write(tmp_path, _with(3, **changes))])
    assert f"eval.tasks: choices cannot be run: document 3: its right answer {gold} is none of its 3 choices" in text
    assert "doc_to_target must give a choice's number, counted from 0" in text


def test_letters_and_the_number_of_them_are_told(tmp_path: Path) -> None:
    rows = [row | {"answer": "AB"[int(row["answer"])]} for row in ROWS]
    text = _check([_write(tmp_path, rows)])
    assert "document 0: its right answer 'A' is none" in text and "(4 other documents have such an answer)" in text
    letters = "{{'ABCD'.index(answer)}}"
    assert _check([_write(tmp_path, rows, doc_to_target=letters)]) == ""


def test_a_field_that_is_a_number_out_of_range_is_refused(tmp_path: Path) -> None:
    assert "its right answer -1 is none" in _check([_write(tmp_path, _with(2, answer=-1), doc_to_target="answer")])


def test_right_answers_as_text_or_as_lists_are_taken(tmp_path: Path) -> None:
    assert _check([_write(tmp_path, doc_to_target="{{choices[answer]}}")]) == ""
    several = [row | {"answer": [0, 2]} for row in ROWS]
    assert _check([_write(tmp_path, several, doc_to_target="answer")]) == ""
    several[4]["answer"] = [0, 5]
    assert "document 4: its right answer [0, 5] is none" in _check([_write(tmp_path, several, doc_to_target="answer")])


def test_only_documents_that_run_are_looked_at(tmp_path: Path) -> None:
    file = _write(tmp_path, _with(4, answer=7))
    assert _check([file], limit=4) == "" and "document 4" in _check([file], limit=5)


def test_too_many_examples_are_refused_with_how_many_there_are(tmp_path: Path) -> None:
    file = _write(tmp_path)
    text = _check([file], num_fewshot=9)
    assert "choices cannot be run: document 0: lm-eval cannot put 9 example(s) before it, of the 5 that" in text
    assert text.endswith("lower eval.num_fewshot") and _check([file], num_fewshot=2) == ""
    own = _check([_write(tmp_path, name="own", task="own", num_fewshot=9)])
    assert "cannot put 9 example(s)" in own and own.endswith("its definition asks for them, lower eval.num_fewshot")


@pytest.mark.parametrize("number", [1, 2, 4])  # lm-eval tries document 0 when it loads a task
def test_a_template_that_fails_is_said_with_its_document(number: int, tmp_path: Path) -> None:
    rows = [row | {"parts": {"a": None if index == number else "x"}} for index, row in enumerate(ROWS)]
    text = _check([_write(tmp_path, rows, doc_to_text="{{parts.a.upper()}}")])
    assert f"document {number}: lm-eval cannot make its request (UndefinedError: " in text


def test_an_empty_answer_or_prompt_is_refused(tmp_path: Path) -> None:
    empty = _with(2, choices=["", "b", "c"])
    assert "document 2: an answer is empty" in _check([_write(tmp_path, empty, target_delimiter="")])
    assert _check([_write(tmp_path, empty)]) == ""  # lm-eval scores the space before it
    assert "document 1: its prompt is empty" in _check(
        [_write(tmp_path, _with(1, question=""), **WRITES, doc_to_text="{{question}}")]
    )
    blank = _with(1, question="  ")
    assert "document 1: its prompt '  ' holds no more" in _check([_write(tmp_path, blank, doc_to_text="{{question}}")])


@pytest.mark.parametrize("text", ["", " \n "])
def test_an_empty_text_is_refused(text: str, tmp_path: Path) -> None:
    said = _check([_write(tmp_path, _with(3, question=text), **ROLLING)])
    assert "(text) cannot be run: document 3: its text is empty" in said and "drop its line" in said
    assert "document 0: its text is empty" in _check([_write(tmp_path, [{"question": text}] * 3, **ROLLING)])


def _cut(names: list[str], context: int, tokenizer: Any = None, **changes: Any) -> dict[str, int]:
    settings = Settings(names=names, batch_size=3, **changes)
    return check_runnable(load_tasks(settings), settings, tokenizer or byte_tokenizer(), context)


def _runs(names: list[str], context: int) -> None:
    settings = Settings(names=names, batch_size=3)
    model = tiny_model(vocab_size=len(byte_tokenizer()), max_position_embeddings=context)
    run_tasks(transformers_lm(model, byte_tokenizer()), load_tasks(settings), settings)


def test_more_new_tokens_than_the_context_holds_are_refused(tmp_path: Path) -> None:
    file = _write(tmp_path, **WRITES)
    text = _check([file], context=4)  # lm-eval asks for one token at least of the prompt
    assert "(writes) cannot be run: it lets the model write 4 tokens" in text and "this model's context has 4," in text
    assert "set a smaller max_gen_toks" in text and "leave the task out" in text and "longer context" in text
    with pytest.raises(AssertionError, match="must be less than model's maximum sequence length"):
        _runs([file], 4)
    assert _check([file], context=5) == ""
    _runs([file], 5)
    silent = _write(tmp_path, **{**WRITES, "generation_kwargs": {"until": ["\n"]}})
    assert "write 256 tokens" in _check([silent], context=256) and _check([silent], context=257) == ""


def test_an_answer_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    file = _write(tmp_path, _with(2, choices=["a" * 40, "b", "c"]))
    text = _check([file], context=40)
    assert "choices cannot be run: document 2: an answer has 41 tokens, and this model's context 40; drop" in text
    with pytest.raises(AssertionError):
        _runs([file], 40)
    assert _check([file], context=41) == ""
    _runs([file], 41)


def test_prompts_that_lm_eval_cuts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [_write(tmp_path), _write(tmp_path, name="writes", **WRITES), _write(tmp_path, name="text", **ROLLING)]
    prompts = [f"Q: {row['question']}\nA:" for row in ROWS]
    longest = [
        len(prompt) + max(len(f" {each}") for each in row["choices"]) for prompt, row in zip(prompts, ROWS, strict=True)
    ]
    for context in range(12, 40):
        choices = sum(length - 1 > context for length in longest)  # a token is a byte, and the last is no input
        writes = sum(len(prompt) + 4 > context for prompt in prompts)
        expected = {name: number for name, number in (("choices", choices), ("writes", writes)) if number}
        assert _cut(names, context) == expected
    assert _cut(names, 2048) == {} and _cut(names, 16, limit=2)["choices"] == 2
    for context, warned in ((max(longest) - 1, False), (max(longest) - 2, True)):
        caplog.clear()
        with caplog.at_level("WARNING", logger="lm_eval.models.huggingface"):
            _runs(names[:1], context)
        assert any("exceeds model's maximum length" in record.message for record in caplog.records) is warned


def test_texts_beyond_ascii_are_counted_in_tokens(tmp_path: Path) -> None:
    file = _write(tmp_path, _with(1, question="é" * 40), **WRITES)  # 80 bytes of 40 characters, and 6 around them
    assert _cut([file], 90) == {} and _cut([file], 89) == {"choices": 1}


def test_texts_that_surely_fit_are_not_made_tokens_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "tok_encode", lambda *args, **options: pytest.fail("made tokens"))
    assert _cut([_write(tmp_path), _write(tmp_path, name="writes", **WRITES)], 128) == {}


@pytest.mark.parametrize(
    ("architecture", "options", "own", "expected"),
    [
        ("qwen3", {"max_position_embeddings": 300}, 200, 300),
        ("gpt2", {"n_positions": 301}, 200, 301),
        ("gemma3", {"text_config": {"max_position_embeddings": 302}}, 200, 302),
        ("bloom", {}, 303, 303),
        ("bloom", {}, None, 2048),
    ],
)
def test_the_context_is_the_one_that_lm_eval_takes(
    architecture: str, options: dict[str, Any], own: int | None, expected: int, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig

    config, tokenizer = AutoConfig.for_model(architecture, **options), byte_tokenizer()
    config.save_pretrained(tmp_path)
    tokenizer.model_max_length = own or tokenizer.model_max_length
    assert context_length(tmp_path, tokenizer) == expected
    lm = SimpleNamespace(
        _max_length=None, model=SimpleNamespace(config=config), tokenizer=tokenizer, _DEFAULT_MAX_LENGTH=2048
    )
    assert HFLM.max_length.fget(lm) == expected


def test_a_chat_template_that_fails_is_found(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('one turn only') if messages|length > 1 else messages[0].content }}"
    file = _write(tmp_path)
    assert _check([file], tokenizer, chat_template=True) == ""
    text = _check([file], tokenizer, chat_template=True, num_fewshot=1)
    assert "cannot put 1 example(s) before it" in text and "one turn only" in text


def test_what_fails_is_said_of_every_task(tmp_path: Path) -> None:
    first = _write(tmp_path, _with(1, answer=9))
    second = _write(tmp_path, _with(1, answer=9), name="again", task="other")
    lines = _check([first, second]).splitlines()
    assert [line.split(" cannot")[0] for line in lines] == ["eval.tasks: choices", "eval.tasks: again (other)"]


def _save_model(folder: Path, context: int) -> None:
    from transformers import AutoConfig

    byte_tokenizer().save_pretrained(folder)
    AutoConfig.for_model("qwen3", max_position_embeddings=context).save_pretrained(folder)


def test_the_check_tells_how_many_prompts_are_cut(tmp_path: Path) -> None:
    _save_model(tmp_path / "model", 19)
    names = [_write(tmp_path), _write(tmp_path, name="text", **ROLLING)]
    job = {"tasks": {"names": names}, "model": str(tmp_path / "model")}
    assert check_tasks(job, lambda done, total: None)["cut"] == {"choices": 4}


def test_the_packaged_tasks_fit_a_tiny_model(tmp_path: Path) -> None:
    _save_model(tmp_path, 2048)
    names = [f"examples/tasks/{name}.yaml" for name in ("choices", "answers", "perplexity")]
    found = check_tasks({"tasks": {"names": names, "chat_template": True}, "model": str(tmp_path)}, lambda *_: None)
    assert found["cut"] == {} and list(found["samples"]) == ["choices", "answers", "perplexity"]


def test_the_check_tells_how_many_examples_each_task_has(tmp_path: Path) -> None:
    none = _write(tmp_path, name="none", task="none", num_fewshot=0)
    text = _write(tmp_path, name="text", **ROLLING)
    _save_model(tmp_path / "model", 2048)
    tasks = {"names": [_write(tmp_path), none, text], "num_fewshot": 2, "limit": 3}
    job = {"tasks": tasks, "model": str(tmp_path / "model")}
    found = check_tasks(job, lambda done, total: None)
    assert found["num_fewshot"] == {"choices": 2, "none": 0, "text": 0}
    assert found["samples"] == dict.fromkeys(("choices", "none", "text"), 3) and len(found["fingerprint"]) == 16
    tasks["num_fewshot"] = 50
    with pytest.raises(UserError, match=r"lower eval\.num_fewshot"):
        check_tasks(job, lambda done, total: None)


def test_the_prompts_hold_the_number_of_examples_that_is_told(tmp_path: Path) -> None:
    names = [_write(tmp_path), _write(tmp_path, name="none", task="none", num_fewshot=0)]
    settings = Settings(names=names, num_fewshot=2, batch_size=3)
    told = few_shot_numbers(load_tasks(settings))
    model = tiny_model(vocab_size=len(byte_tokenizer()))
    for row in run_tasks(transformers_lm(model, byte_tokenizer()), load_tasks(settings), settings):
        assert row.prompt.count("Q: ") - 1 == told[row.name]


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks a, b (tag "pair") and groups of them, which lm-eval knows by name."""
    from lm_eval.tasks import TaskManager

    mean = {"metric": "acc", "aggregation": "mean"}
    for name, few in (("a", 0), ("b", 1)):
        data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
        _write(tmp_path, name=name, task=name, tag="pair", num_fewshot=few, **data)
    groups: dict[str, dict[str, Any]] = {
        "weighted": {"task": ["a", "b"], "aggregate_metric_list": [mean | {"weight_by_size": True}]},
        "unweighted": {"task": ["a", "b"], "aggregate_metric_list": [mean | {"weight_by_size": False}]},
        "listed": {"task": ["a", "b"]},
        "outer": {"task": ["weighted"]},
    }
    for name, group in groups.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"group": name, **group}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("quantize.tasks.open_manager", lambda expanded: manager)
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "reported"),
    [
        ("weighted", {"weighted": ["a", "b"]}),
        ("unweighted", {"a": ["a"], "b": ["b"]}),
        ("listed", {"a": ["a"], "b": ["b"]}),
        ("pair", {"a": ["a"], "b": ["b"]}),
        ("outer", {"weighted": ["a", "b"]}),
        ("a", {"a": ["a"]}),
    ],
)
def test_only_what_lm_eval_pools_is_pooled(registered: Path, asked: str, reported: dict[str, list[str]]) -> None:
    found = load_tasks(Settings(names=[asked]))
    assert {name: list(leaves) for name, leaves in found.items()} == reported


def test_a_group_whose_tasks_differ_in_examples_says_both(registered: Path) -> None:
    assert few_shot_numbers(load_tasks(Settings(names=["weighted"]))) == {"weighted": "0 or 1"}
    assert few_shot_numbers(load_tasks(Settings(names=["weighted"], num_fewshot=3))) == {"weighted": "0 or 3"}


def test_a_group_that_may_be_split_is_named_as_it_may_be_reported(registered: Path) -> None:
    from lm_eval.tasks import TaskManager

    data = {"dataset_kwargs": {"data_files": {"test": str(registered / "rows.jsonl")}}}
    for name, metric in (("c", "acc"), ("d", "acc_norm")):  # f1 is a number of all samples only
        metrics = [{"metric": each, "aggregation": "mean", "higher_is_better": True} for each in ("f1", metric)]
        metrics[0]["aggregation"] = "f1"
        two = {"doc_to_choice": "{{choices[:2]}}", "num_fewshot": 2}
        _write(registered, name=name, task=name, metric_list=metrics, **two, **data)
    group = [{"metric": "f1", "aggregation": "mean", "weight_by_size": True}]
    text = json.dumps({"group": "mixed", "task": ["c", "d"], "aggregate_metric_list": group})
    (registered / "mixed.yaml").write_text(text)
    manager = TaskManager(include_path=str(registered), include_defaults=False)
    settings = Settings(names=["mixed"], batch_size=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.tasks.open_manager", lambda expanded: manager)
        assert few_shot_numbers(load_tasks(settings)) == {"c": 2, "d": 2, "mixed": 2}
        assert _cut(["mixed"], 19) == {"c": 5, "d": 5, "mixed": 10}
        model = tiny_model(vocab_size=len(byte_tokenizer()))
        rows = run_tasks(transformers_lm(model, byte_tokenizer()), load_tasks(settings), settings)
    assert {(row.name, row.metric) for row in rows} == {("c", "acc"), ("d", "acc_norm")}


def test_a_file_may_not_take_a_reported_name(registered: Path) -> None:
    (registered / "mine").mkdir()
    file = _write(registered / "mine", name="a", task="something_else")
    with pytest.raises(UserError, match="two tasks would be reported as a"):
        load_tasks(Settings(names=["pair", file]))


def test_an_overflowing_model_scores_no_number(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=len(byte_tokenizer()))
    names = [_write(tmp_path), _write(tmp_path, name="text", **ROLLING)]
    settings = Settings(names=names, batch_size=3)
    sound = run_tasks(transformers_lm(model, byte_tokenizer()), load_tasks(settings), settings)
    assert all(math.isfinite(row.value or 0.0) for row in sound)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = math.nan
    rows = run_tasks(transformers_lm(model, byte_tokenizer()), load_tasks(settings), settings)
    assert len(rows) == 10 and all(row.value is not None and math.isnan(row.value) for row in rows)
    assert json.loads(rows[0].others) == {"acc_norm": None}
    with pytest.raises(UserError, match="base: choices has no number for 5 of 5 samples"):
        task_metrics({"base": rows}, ["base"], [])


@pytest.mark.parametrize(("worst", "finite"), [(-2.0, True), (-math.inf, False), (math.nan, False), (math.inf, False)])
def test_one_choice_without_a_number_is_an_overflow(worst: float, finite: bool) -> None:
    sample = {
        "filter": "none", "doc_id": 0, "doc_hash": "h", "metrics": ["acc", "f1"], "acc": 1.0, "f1": (0, 0), "target": 0,
        "arguments": [("Q", " a"), ("Q", " b")], "resps": [[(-1.0, True)], [(worst, False)]],
    }  # fmt: skip
    (row,) = rows_of("x", "x", SimpleNamespace(higher_is_better=lambda: {"acc": True, "f1": True}), [sample])
    assert row.metric == "acc" and math.isfinite(row.value or math.nan) is finite and row.others == "{}"


def test_the_metrics_after_the_first_are_kept(tmp_path: Path) -> None:
    names = [_write(tmp_path), _write(tmp_path, name="text", **ROLLING)]
    settings = Settings(names=names, batch_size=3)
    rows = run_tasks(
        transformers_lm(tiny_model(vocab_size=len(byte_tokenizer())), byte_tokenizer()), load_tasks(settings), settings
    )
    for number, row in enumerate(rows):
        others = json.loads(row.others)
        if row.name == "choices":
            assert row.metric == "acc" and others["acc_norm"] in (0.0, 1.0)
        else:
            question = ROWS[number - 5]["question"]
            assert row.value is not None and others == {"nats per byte": pytest.approx(row.value / len(question))}


def test_rows_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    rows = [Row("x", "x", 0, "h", "acc", 1.0, 1.0, True, "p", "t", "r", '{"acc_norm": 0.0}')]
    save_rows(rows, tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet") == rows
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    assert table.column_names[-1] == "others"
    pyarrow.parquet.write_table(table.drop_columns(["others"]), tmp_path / "old.parquet")
    assert load_rows(tmp_path / "old.parquet")[0].others == "{}"
