"""lm-eval's tasks through a served model give what they give through transformers, sample by sample."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import make_environment
from tiny_models import tiny_model

from quantize.errors import UserError
from quantize.serving import check, client, tasks
from quantize.serving.check import Served
from quantize.serving.engine import describe
from quantize.serving.environment import find_vllm
from quantize.serving.server import Server, serving
from quantize.serving.tasks import ServedLM, _checkpoint, greedy_decoding, refuse_decoding, served_lm
from quantize.task_checks import check_runnable
from quantize.tasks import Row, Settings, load_rows, load_tasks, run_tasks, transformers_lm
from quantize.worker_jobs import benchmark, check_tasks
from train.models import byte_tokenizer

CONTEXT = 96
WORDS = ("cat", "stone", "river", "ox", "window")
ROWS = [
    {
        "question": f"spell {word}",
        "choices": [" ".join(word), " ".join(reversed(word)), word, "a"],
        "answer": number % 2,
    }
    for number, word in enumerate(WORDS)
]
COMMON = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
PROMPT = "Q: {{question}}\nA:"
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": PROMPT,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "one_answer": {  # a log-likelihood with whether it is the greedy answer
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}} ",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [
            {"metric": name, "aggregation": name if name == "perplexity" else "mean"} for name in ("acc", "perplexity")
        ],
    },
    "text": {  # longer than the context, so that it is read in windows
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question * (1 + answer * 12)}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
    "writes": {
        "output_type": "generate_until",
        "doc_to_text": PROMPT,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": EXACT,
    },
    "long": {  # the prompt is cut from the left
        "output_type": "generate_until",
        "doc_to_text": "{{question * 12}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": [], "max_gen_toks": 8},
        "metric_list": EXACT,
    },
}


def _write(home: Path, name: str, task: dict[str, Any]) -> None:
    (home / f"{name}.yaml").write_text(json.dumps({"task": name, **COMMON, **task}))  # JSON is YAML


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files with their rows beside them."""
    home = tmp_path_factory.mktemp("tasks")
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        _write(home, name, task)
    return home


def _with_start(tokenizer: Any) -> Any:
    """The tokenizer as that of a Llama: a token begins every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|im_start|>"
    start = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start[0]} $A", pair=f"{start[0]} $A $B", special_tokens=[start]
    )
    return tokenizer


def _with_special(tokenizer: Any, character: str) -> Any:
    """The tokenizer with that character as a special token, which decoding leaves out."""
    tokenizer.add_special_tokens({"additional_special_tokens": [character]}, replace_extra_special_tokens=False)
    return tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    """With settings of its own for decoding, which transformers keeps to."""
    found = tiny_model(vocab_size=len(byte_tokenizer()), max_position_embeddings=CONTEXT, seed=1)
    found.generation_config.eos_token_id, found.generation_config.repetition_penalty = [1, 5], 1.3
    return found


@pytest.fixture(scope="module")
def written(model: Any, folder: Path) -> str:
    """What the model writes after the first prompt without a stop string."""
    settings = Settings([str(folder / "writes.yaml")], limit=1)
    return run_tasks(transformers_lm(model, byte_tokenizer()), load_tasks(settings), settings)[0].response


@pytest.fixture(scope="module")
def checkpoint(model: Any, written: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with settings for its decoding, and a tokenizer one of whose characters is special."""
    tokenizer = byte_tokenizer()
    model.save_pretrained(found := tmp_path_factory.mktemp("model") / "plain")
    _with_special(tokenizer, written[3]).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where `find_vllm` finds the stand-in, here and in processes that are started here."""
    found = make_environment(tmp_path_factory.mktemp("vllm") / "env")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONGRID_VLLM", str(found))
        yield found


@pytest.fixture(scope="module")
def server(checkpoint: Path, environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(checkpoint, find_vllm(), log=tmp_path_factory.mktemp("log") / "log") as found:
        yield found


def _both(model: Any, server: Server, checkpoint: Path, tokenizer: Any, settings: Settings) -> list[list[Row]]:
    """The rows through transformers, in the server's context, and those through the server."""
    plain = transformers_lm(model, tokenizer)
    plain._max_length = CONTEXT - 2
    served = ServedLM(server, tokenizer, CONTEXT, greedy_decoding(checkpoint))
    return [run_tasks(lm, load_tasks(settings), settings) for lm in (plain, served)]


def _number(response: str) -> tuple[str, float]:
    """A response's text, and the log-likelihood behind it."""
    if not response.endswith(")"):
        return ("", float(response))
    text, _, value = response.rpartition(" (")
    return text, float(value[:-1])


def _same(plain: list[Row], served: list[Row]) -> None:
    assert len(plain) == len(served) > 0
    for one, other in zip(plain, served, strict=True):
        if one.task in ("choices", "one_answer", "text"):
            (text, value), (served_text, served_value) = _number(one.response), _number(other.response)
            assert text == served_text and served_value == pytest.approx(value, abs=2e-3)
            one, other = replace(one, response=""), replace(other, response="")
        assert other.value == pytest.approx(one.value, rel=1e-5) and other.weight == one.weight
        others = [json.loads(row.others) for row in (one, other)]
        assert others[1] == pytest.approx(others[0], rel=1e-5)
        assert replace(one, value=0, others="") == replace(other, value=0, others="")


@pytest.mark.parametrize("start", [False, True])
def test_a_served_model_gives_the_rows_of_transformers(
    start: bool, model: Any, server: Server, checkpoint: Path, folder: Path
) -> None:
    tokenizer = _with_start(byte_tokenizer()) if start else byte_tokenizer()
    settings = Settings([str(folder / f"{name}.yaml") for name in TASKS], batch_size=1)
    plain, served = _both(model, server, checkpoint, tokenizer, settings)
    _same(plain, served)
    assert {row.task for row in plain} == set(TASKS)
    assert len({row.response for row in plain if row.task == "writes"}) > 1


def test_examples_and_the_chat_template_are_those_of_transformers(
    model: Any, server: Server, checkpoint: Path, folder: Path
) -> None:
    names = [str(folder / f"{name}.yaml") for name in ("choices", "writes")]
    settings = Settings(names, num_fewshot=1, limit=2, chat_template=True, batch_size=1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
    plain, served = _both(model, server, checkpoint, tokenizer, settings)
    _same(plain, served)
    assert served[0].prompt.count("[u]") == 2


def test_stop_strings_end_an_answer(model: Any, server: Server, checkpoint: Path, folder: Path, written: str) -> None:
    for stop, tokenizer in (
        (written[4:6], byte_tokenizer()),
        (written[3], _with_special(byte_tokenizer(), written[3])),
    ):
        kwargs = {"until": ["never", stop], "max_gen_toks": 12}
        _write(folder, "stops", TASKS["writes"] | {"generation_kwargs": kwargs})
        settings = Settings([str(folder / "stops.yaml")], batch_size=1)
        plain, served = _both(model, server, checkpoint, tokenizer, settings)
        _same(plain, served)
        assert served[0].response == written.split(stop)[0].replace(
            written[3], "" if stop == written[3] else written[3]
        )


def test_of_two_tokens_that_are_as_likely_one_is_the_greedy_one() -> None:
    from quantize.serving.tasks import _result

    score = client.Score([-1.0, -0.5, -0.7], [7, 8, 9], [-1.0, -0.5, -0.7])
    assert _result(score, [8, 9]) == (pytest.approx(-1.2), True)
    assert _result(score, [8, 3]) == (pytest.approx(-1.2), False)
    assert _result(client.Score([-1.0, -9999.0], [1, 2], [0.0, 0.0]), [2]) == (-torch.inf, True)


def test_a_request_that_a_short_server_would_cut_is_refused(server: Server, checkpoint: Path, folder: Path) -> None:
    short = replace(server, max_length=40)
    for name, tokens in (("text", 96), ("long", 94)):
        settings = Settings([str(folder / f"{name}.yaml")])
        lm = ServedLM(short, byte_tokenizer(), CONTEXT, {})
        with pytest.raises(UserError, match=rf"has {tokens} tokens, and vLLM serves this model with 40"):
            run_tasks(lm, load_tasks(settings), settings)


def test_what_is_cut_is_counted_in_the_context_of_the_server(folder: Path) -> None:
    tokenizer, settings = byte_tokenizer(), Settings([str(folder / "choices.yaml")])
    longest = max(len(f"Q: {row['question']}\nA: {choice}") for row in ROWS for choice in row["choices"])
    for served, context in ((False, longest - 1), (True, longest + 1)):  # an answer's last token is no input
        assert check_runnable(load_tasks(settings), settings, tokenizer, context, served=served) == {}
        assert check_runnable(load_tasks(settings), settings, tokenizer, context - 1, served=served)["choices"] >= 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"do_sample": True, "temperature": 0.7}, "do_sample: True"), ({"num_beams": 4}, "num_beams: 4")],
)
def test_a_task_that_is_not_decoded_greedily_is_refused_before_anything_is_trained(
    asked: dict[str, Any], said: str, checkpoint: Path, folder: Path
) -> None:
    _write(folder, "sampled", TASKS["writes"] | {"generation_kwargs": {"max_gen_toks": 8, **asked}})
    job = {"model": str(checkpoint), "tasks": {"names": [str(folder / "sampled.yaml")]}}
    assert check_tasks(job, lambda done, total: None)["samples"] == {"sampled": len(ROWS)}
    with pytest.raises(UserError, match=f"sampled cannot be run: its generation_kwargs ask for {said}"):
        check_tasks({**job, "engine": {"name": "vllm"}}, lambda done, total: None)


def test_what_transformers_does_beside_greedy_decoding_is_refused_where_a_task_writes(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    settings = json.loads((other / "generation_config.json").read_text())
    harmless = {"no_repeat_ngram_size": 0, "min_new_tokens": 0, "suppress_tokens": [], "num_beams": 1, "top_p": 0.5}
    (other / "generation_config.json").write_text(json.dumps(settings | harmless))
    refuse_decoding(other)
    (other / "generation_config.json").write_text(json.dumps(settings | {"no_repeat_ngram_size": 3, "num_beams": 2}))

    def check(name: str, model: Path, *others: Path) -> Any:
        asked = {"tasks": {"names": [str(folder / f"{name}.yaml")]}, "engine": {"name": "vllm"}}
        return check_tasks({"model": str(model), "others": [*map(str, others)], **asked}, lambda done, total: None)

    assert check("choices", other)["samples"] == {"choices": len(ROWS)}
    for models in ((other,), (checkpoint, other)):
        with pytest.raises(
            UserError, match=r"other: .* have no_repeat_ngram_size: 3, num_beams: 2, which is not asked"
        ):
            check("writes", *models)


def test_an_answer_that_leaves_no_room_in_the_context_is_refused(server: Server) -> None:
    lm = ServedLM(server, byte_tokenizer(), CONTEXT, {})
    with pytest.raises(UserError, match="an answer takes 95 tokens, and this model's context has 94"):
        lm._loglikelihood_tokens([(None, [5], [6] * 95)])
    assert lm._prompt("abc", 93) == byte_tokenizer().encode("c")
    with pytest.raises(UserError, match="an answer takes 95 tokens"):
        lm._prompt("abc", 94)


def test_only_checkpoints_that_nobody_holds_are_removed(tmp_path: Path) -> None:
    rows = tmp_path / "base.tasks.parquet"
    made: list[Path] = []

    def convert(job: Any) -> None:
        made.append(Path(job["output"]))
        made[-1].with_name("partial").mkdir(parents=True)  # as a conversion that is at work
        made[-1].mkdir()

    left = tmp_path / "base.tasks.served.0a1b2c3d"
    left.mkdir()
    left.with_name(f"{left.name}.lock").touch()
    job = {"model": "m", "simulate": {"scheme": "int8"}}
    with _checkpoint(job, rows, convert) as first:
        assert list(tmp_path.glob("*.served.*")) and not left.exists()
        with _checkpoint(job, rows, convert) as second:  # another process's, which must leave the first alone
            assert all(each.is_dir() and each.with_name("partial").is_dir() for each in (first, second))
            assert made == [first, second] and first.parent != second.parent
    assert not list(tmp_path.iterdir())


def test_a_run_without_memory_for_the_server_is_told_what_it_can_do(
    checkpoint: Path, environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "oom")
    job = {"model": str(checkpoint), "engine": describe(find_vllm()), "task_rows": str(tmp_path / "rows.parquet")}
    with (
        pytest.raises(UserError, match=r"does not suffice: .*CUDA out of memory.* or run the tasks with eval\.engine="),
        served_lm(job, byte_tokenizer(), lambda form: None),
    ):
        pass


def test_a_quantised_folder_keeps_its_dtype_whatever_its_format(
    checkpoint: Path, environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    @contextmanager
    def serve(folder: Path, vllm: Any, *, arguments: Any, **_: Any) -> Iterator[Server]:
        asked.append([*arguments])
        yield Server("url", "model", CONTEXT)

    monkeypatch.setattr(tasks, "serving", serve)
    unknown = Served(checkpoint, "x", (), None, None, chats=False)
    monkeypatch.setattr(check, "check_folder", lambda *_, **__: unknown)
    job = {"model": str(checkpoint), "dtype": "bfloat16", "engine": describe(find_vllm()), "task_rows": "rows.parquet"}
    for quantised in (False, True):
        other = shutil.copytree(checkpoint, tmp_path / str(quantised))
        if quantised:
            settings = json.loads((other / "config.json").read_text())
            (other / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "x"}}))
        with served_lm({**job, "model": str(other)}, byte_tokenizer(), lambda form: None):
            assert ("--dtype" in asked[-1]) is not quantised
    assert asked[0][-2:] == ["--dtype", "bfloat16"]


def test_a_simulated_arm_is_served_as_it_would_ship(
    checkpoint: Path, environment: Path, folder: Path, tmp_path: Path
) -> None:
    form = {"scheme": "int8", "target": "cuda", "group_size": None, "skip": []}
    names = [str(folder / f"{name}.yaml") for name in ("choices", "writes")]
    job = {"model": str(checkpoint), "dtype": "float32", "simulate": form, "tasks": {"names": names, "batch_size": 1}}
    found = []
    for name, engine in (("plain", None), ("served", describe(find_vllm()))):
        path = tmp_path / f"{name}.parquet"
        benchmark({**job, "engine": engine, "task_rows": str(path)}, lambda done, total: None)
        found.append(load_rows(path))
    _same(*found)
    assert {path.name for path in tmp_path.iterdir()} == {"plain.parquet", "served.parquet", "served.vllm.log"}
    other = describe(find_vllm()) | {"version": "0.22.0", "packages": {"vllm": "0.22.0"}}
    with pytest.raises(
        UserError, match=r"vllm 0\.23\.0, torchao 0\.18\.0, and the other arms' tasks ran with vllm 0\.22\.0"
    ):
        benchmark({**job, "engine": other, "task_rows": str(tmp_path / "x.parquet")}, lambda done, total: None)
