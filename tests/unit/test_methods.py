"""dpo and grpo before any training: what is refused, how rows are read, what rewards give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import UserError
from quantize.rewards import load_rewards, rate, source_key
from train.config import RunConfig
from train.config_checks import find_problems
from train.data import load_prepared, prepare_data, save_prepared
from train.data_formats import Preference, find_format, to_preference

BASE: dict[str, Any] = {"model": {"id": "random", "architecture": "qwen3", "random": "tiny"}, "data": {"train": "x"}}
USER, YES, NO = (
    {"role": "user", "content": "ok?"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)


def problems(**sections: Any) -> list[str]:
    settings = {**BASE, **sections}
    settings["data"] = {"train": "x", **sections.get("data", {})}
    settings["model"] = {**BASE["model"], "backend": "peft", **sections.get("model", {})}
    return [problem.text for problem in find_problems(RunConfig.model_validate(settings))]


class TestSettings:
    @pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
    def test_a_method_alone_is_fine(self, method: str) -> None:
        assert problems(train={"method": method, "per_device_train_batch_size": 8}, qat="int8-int4") == []

    @pytest.mark.parametrize(
        ("sections", "said"),
        [
            ({"data": {"format": "preference"}}, "learned with train.method=dpo"),
            ({"train": {"method": "dpo"}, "data": {"packing": True}}, "data.packing"),
            ({"train": {"method": "dpo"}, "data": {"answers_only": False}}, "data.answers_only"),
            ({"train": {"method": "dpo"}, "data": {"format": "alpaca"}}, "pairs of answers"),
            ({"train": {"method": "dpo"}, "lora": None}, "second copy of the model"),
            ({"train": {"method": "dpo"}, "lora": {"target_modules": ["q_proj", "lm_head"]}}, "leave lm_head out"),
            ({"train": {"method": "dpo"}, "qat": "int4", "fake_quant": {"distill": 0.5}}, "fake_quant.distill"),
            ({"train": {"method": "dpo", "extra": {"beta": 0.2}}}, "use dpo.beta"),
            ({"train": {"method": "dpo", "extra": {"num_generations": 4}}}, "no field of trl's DPOConfig"),
            ({"train": {"method": "dpo"}, "dpo": {"loss_type": "sigmiod"}}, "did you mean sigmoid?"),
            ({"train": {"method": "dpo"}, "dpo": {"loss_type": "exo_pair"}}, "label_smoothing above 0"),
            ({"train": {"method": "dpo", "extra": {"use_liger_kernel": True}}}, "go past fake quantisers"),
            ({"train": {"method": "grpo"}}, "must be a multiple"),
            ({"train": {"method": "grpo"}, "grpo": {"num_generations": 2}, "data": {"format": "text"}}, "prompts with"),
            ({"train": {"method": "grpo"}, "grpo": {"num_generations": 2, "rewards": []}}, "nothing would be learned"),
            (
                {"train": {"method": "grpo"}, "grpo": {"num_generations": 2, "reward_weights": [1.0, 2.0]}},
                "2 numbers for 1 grpo.rewards",
            ),
            ({"train": {"method": "grpo"}, "lora": None, "grpo": {"num_generations": 2, "beta": 0.1}}, "second copy"),
            (
                {"train": {"method": "grpo"}, "grpo": {"num_generations": 2}, "model": {"backend": "unsloth"}},
                "needs model.backend=peft",
            ),
            (
                {"train": {"method": "grpo", "extra": {"use_vllm": True}}, "grpo": {"num_generations": 2}},
                "16-bit weights",
            ),
        ],
    )
    def test_what_does_not_go_together_is_said(self, sections: dict[str, Any], said: str) -> None:
        (text,) = problems(**sections)
        assert said in text

    def test_fields_of_the_methods_own_config_are_known(self) -> None:
        assert problems(train={"method": "dpo", "extra": {"ld_alpha": 0.5}}) == []
        grpo = {"method": "grpo", "per_device_train_batch_size": 8, "extra": {"top_k": 5}}
        assert problems(train=grpo) == []


class TestPreferences:
    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "ok?", "chosen": "yes", "rejected": "no"},
            {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
            {"prompt": "ok?", "chosen": [USER, YES], "rejected": [USER, NO]},
            {"chosen": [USER, YES], "rejected": [USER, NO]},
        ],
    )
    def test_every_form_reads_alike(self, row: dict[str, Any]) -> None:
        assert to_preference(row, 1, "x.jsonl") == Preference([USER], [YES], [NO])

    def test_conversations_part_where_they_differ(self) -> None:
        row = {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]}
        assert to_preference(row, 1, "x") == Preference([USER, YES, USER], [YES], [NO])

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"chosen": "yes", "rejected": "no"}, "no column 'prompt'"),
            ({"prompt": "ok?", "chosen": "yes", "rejected": None}, "no turns"),
            ({"chosen": [YES, USER], "rejected": [USER, NO]}, "must end with an assistant turn"),
            ({"chosen": [{**USER, "content": "a"}, YES], "rejected": [USER, NO]}, "no prompt in common"),
        ],
    )
    def test_a_row_that_is_none_says_which(self, row: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=r"x\.jsonl, row 7") as raised:
            to_preference(row, 7, "x.jsonl")
        assert said in str(raised.value)

    def test_columns_of_the_wrong_method(self) -> None:
        with pytest.raises(UserError, match="needs the columns chosen, rejected"):
            find_format(["prompt", "completion"], "auto", "x", "dpo")
        with pytest.raises(UserError, match=r"train\.method=dpo"):
            find_format(["prompt", "chosen", "rejected"], "auto", "x")
        with pytest.raises(UserError, match="reference answer"):
            find_format(["prompt"], "auto", "x", "grpo")
        assert find_format(["question", "answer"], "auto", "x", "grpo") == "question_answer"


def test_rows_of_each_method(tmp_path: Path) -> None:
    """Columns, masks and what is left out, on the tiny model's own tokenizer."""
    from transformers import AutoTokenizer

    from train.config import DataConfig, ModelConfig
    from train.models import resolve_model

    model = ModelConfig(id="random", architecture="qwen3", random="tiny")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model, cache=tmp_path, seed=0).folder)
    pairs = [
        {"prompt": f"{number}?", "chosen": "yes", "rejected": "no" if number else "yes", "kind": "a"}
        for number in range(12)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    found = prepare_data(DataConfig(train=str(file)), tokenizer, max_length=64, seed=0, method="dpo")
    row = found.train[0]

    def text(ids: str, mask: str) -> tuple[str, str]:
        learned = [token for token, own in zip(row[ids], row[mask], strict=True) if own]
        rest = [token for token, own in zip(row[ids], row[mask], strict=True) if not own]
        return tokenizer.decode(rest), tokenizer.decode(learned)

    better, worse = text("input_ids", "loss_mask"), text("rejected_ids", "rejected_mask")
    assert better[0] == worse[0] and "?" in better[0]
    assert better[1].startswith("yes") and worse[1].startswith("no")
    assert len(found.train) + len(found.eval) == 11  # the pair of equal answers teaches nothing
    save_prepared(found, tmp_path / "data")
    assert load_prepared(tmp_path / "data").train[0] == row

    file.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}", "kind": "b"}) + "\n" for n in range(12)))
    grpo = prepare_data(DataConfig(train=str(file)), tokenizer, max_length=64, seed=0, method="grpo")
    row = grpo.train[0]
    assert json.loads(row["prompt"]) == [{"role": "user", "content": f"{row['answer']}?"}]
    assert json.loads(row["columns"]) == {"kind": "b"}
    assert grpo.fingerprint != found.fingerprint


class TestRewards:
    def test_the_packaged_ones(self) -> None:
        said = [[{"role": "assistant", "content": text}] for text in ("12", " It is 12.", "1,200", "twelve")]
        answer = ["12", "12", "1200", "12"]
        given = {name: load_rewards([name])[0](completions=said, answer=answer) for name in (
            "exact_match", "contains_answer", "same_number")}  # fmt: skip
        assert given["exact_match"] == [1, 0, 0, 0]
        assert given["contains_answer"] == [1, 1, 0, 0]
        assert given["same_number"] == [1, 1, 1, 0]

    def test_ones_own_by_file_and_by_module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_rewards.py").write_text(
            "def short(completions, kind, **kwargs):\n"
            "    return [1.0 if len(c[0]['content']) < 3 else None for c in completions]\n"
        )
        monkeypatch.chdir(tmp_path)
        for name in ("own_rewards:short", "own_rewards.py:short", f"{tmp_path}/own_rewards.py:short"):
            columns = {"answer": ["a", "b"], "kind": ["x", "y"]}
            assert rate([name, "exact_match"], [2.0, 0.5], [[USER]] * 2, ["a", "long"], [[1], [2]], columns) == [
                2.5,
                0.0,
            ]
            assert source_key(name)
        before = source_key("own_rewards.py:short")
        (tmp_path / "own_rewards.py").write_text("def short(completions, **kwargs):\n    return [0.0]\n")
        assert source_key("own_rewards.py:short") != before
        with pytest.raises(UserError, match="gave 1 numbers for 2 completions"):
            rate(["own_rewards.py:short"], None, [[USER]] * 2, ["a", "b"], [[1], [2]], {"answer": ["a", "b"]})

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ("[float('nan'), None]", None),
            ("['much', 'little']", "ValueError"),
            ("[float('inf'), 1.0]", "an infinite number"),
            ("[len(ids) / 0 for ids in completion_ids]", "ZeroDivisionError"),
            ("[log_metric('a', 1.0), len(completion_ids[1])]", None),
        ],
    )
    def test_whatever_one_gives_is_a_number_or_said(self, body: str, said: str | None, tmp_path: Path) -> None:
        file = tmp_path / "odd.py"
        file.write_text(f"def odd(completion_ids, log_metric, **kwargs):\n    return {body}\n")
        arguments = ([f"{file}:odd"], None, [[USER]] * 2, ["a", "b"], [[1], [2, 3]], {"answer": ["a", "b"]})
        if said is None:
            assert rate(*arguments) == ([0.0, 2.0] if "log_metric" in body else [0.0, 0.0])
        else:
            with pytest.raises(UserError, match=said):
                rate(*arguments)

    def test_one_that_ends_the_program_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "ends.py").write_text("import sys\nsys.exit(3)\n")
        with pytest.raises(UserError, match="SystemExit"):
            load_rewards([f"{tmp_path}/ends.py:f"])

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("exact", "neither packaged"),
            ("nowhere.py:f", "there is no file nowhere.py"),
            ("no_such_module:f", "cannot be imported"),
            ("json:nothing", "has no function nothing"),
        ],
    )
    def test_one_that_is_not_there(self, name: str, said: str) -> None:
        with pytest.raises(UserError, match=r"grpo\.rewards") as raised:
            load_rewards([name, "exact_match"])
        assert said in str(raised.value)
