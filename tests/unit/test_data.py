"""Data formats, masks, splits, and errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import UserError
from train.config import DataConfig
from train.data import check_data_source, load_prepared, prepare_data, save_prepared
from train.models import byte_tokenizer

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "prompt_completion": {"prompt": "2+2?", "completion": "4"},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
}


def _file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _learned(row: dict[str, Any]) -> str:
    tokens = [token for token, learned in zip(row["input_ids"], row["loss_mask"], strict=True) if learned]
    return str(byte_tokenizer().decode(tokens))


@pytest.mark.parametrize("form", ROWS)
def test_every_format_learns_the_answer_and_its_end(form: str, tmp_path: Path) -> None:
    rows = [ROWS[form], json.loads(json.dumps(ROWS[form]).replace("2+2?", "1+3?"))]
    config = DataConfig(train=_file(tmp_path, rows), eval_samples=1)
    prepared = prepare_data(config, byte_tokenizer(), max_length=200, seed=0)
    for row in (*prepared.train, *prepared.eval):
        assert _learned(row) == "4<|im_end|>"


def test_all_assistant_turns_are_learned(tmp_path: Path) -> None:
    row = {"messages": [*CHAT, {"role": "user", "content": "and 3+3?"}, {"role": "assistant", "content": "6"}]}
    other = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    prepared = prepare_data(
        DataConfig(train=_file(tmp_path, [row, other]), eval_samples=1), byte_tokenizer(), max_length=400, seed=0
    )
    assert {_learned(row) for row in (*prepared.train, *prepared.eval)} == {"4<|im_end|>6<|im_end|>", "ho<|im_end|>"}


def test_text_learns_every_token(tmp_path: Path) -> None:
    config = DataConfig(train=_file(tmp_path, [{"text": "one"}, {"text": "two"}]), eval_samples=1)
    prepared = prepare_data(config, byte_tokenizer(), max_length=50, seed=0)
    assert all(all(row["loss_mask"]) for row in prepared.train)


def test_equal_rows_never_stand_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number % 20}+1?", "completion": str(number % 20 + 1)} for number in range(60)]
    prepared = prepare_data(
        DataConfig(train=_file(tmp_path, rows), eval_samples=5), byte_tokenizer(), max_length=100, seed=0
    )
    train, held = ({tuple(row["input_ids"]) for row in part} for part in (prepared.train, prepared.eval))
    assert not train & held and len(train) + len(held) == 20
    assert prepared.statistics["dropped"]["repeated"] == 40
    save_prepared(prepared, tmp_path / "saved")
    again = load_prepared(tmp_path / "saved")
    assert again.fingerprint == prepared.fingerprint and again.train.to_list() == prepared.train.to_list()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', "line 2"),
        ('{"question": "a"}\n', "fit no known format"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "row 1"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}\n', "row 1"),
        ("", "empty"),
    ],
)
def test_bad_rows_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        prepare_data(DataConfig(train=str(path)), byte_tokenizer(), max_length=100, seed=0)


def test_a_missing_file_is_found_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"no file nowhere\.jsonl"):
        check_data_source(DataConfig(train="nowhere.jsonl"))


def test_truncation_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trainable token"):
        prepare_data(DataConfig(train=_file(tmp_path, [ROWS["messages"]])), byte_tokenizer(), max_length=5, seed=0)


def test_a_name_that_is_no_hub_id_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"my own rows is no local file, and the name is no hub id"):
        check_data_source(DataConfig(train="my own rows"))
