"""Tokenised data that runs share: found again, and never stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from train.config import RunConfig
from train.data_cache import data_key, shared


def config(train: Path | str, **data: Any) -> RunConfig:
    length = data.pop("max_length", 64)
    seed = data.pop("seed", 0)
    sections = {"data": {"train": str(train), **data}, "train": {"max_length": length}, "run": {"seed": seed}}
    return RunConfig.model_validate({"model": {"id": "m"}, **sections})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    return path


def test_the_key_follows_whatever_decides_the_tokens(tmp_path: Path, model: Path, rows: Path) -> None:
    first = data_key(config(rows), model)
    moved = shutil.copy(rows, tmp_path / "moved.jsonl")
    assert first is not None and data_key(config(moved), model) == first, "the contents count, not the name"
    (model / "model.safetensors").write_bytes(b"others")
    assert data_key(config(rows), model) == first, "weights decide no tokens"
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    keys = [first]
    changes: list[dict[str, Any]] = [
        {"seed": 1}, {"max_length": 65}, {"train_samples": 3}, {"eval": str(moved)}, {"format": "prompt_completion"},
        {"chat_template": str(template)}, {"answers_only": False}, {"eval_samples": 7},
    ]  # fmt: skip
    keys += [data_key(config(rows, **change), model) for change in changes]
    template.write_text("{{ messages }} ")
    keys.append(data_key(config(rows, chat_template=str(template)), model))
    (model / "vocab.txt").write_text("x")
    keys.append(data_key(config(rows), model))
    rows.write_text(rows.read_text() + "\n")
    keys.append(data_key(config(rows), model))
    assert len(set(keys)) == len(keys)


def test_data_that_may_change_unseen_has_no_key(tmp_path: Path, model: Path, rows: Path) -> None:
    assert data_key(config("owner/name"), model) is None
    assert data_key(config(rows, eval="owner/name"), model) is None
    assert data_key(config(tmp_path / "none.jsonl"), model) is None


def test_made_once_and_copied(tmp_path: Path) -> None:
    made: list[Path] = []

    def fill(folder: Path, text: str = "tokens") -> Any:
        def make() -> None:
            made.append(folder)
            folder.mkdir(exist_ok=True)
            (folder / "train.parquet").write_text(text)

        return make

    cache, files = tmp_path / ".cache" / "data", ["train.parquet"]
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert not shared(first, files, cache, lambda: "key", fill(first))
    second.mkdir()
    (second / "stale.parquet").write_text("of a run that was broken off")
    assert shared(second, files, cache, lambda: "key", fill(second))
    assert [path.name for path in second.iterdir()] == files and made == [first]
    (second / "train.parquet").write_text("changed by its run")
    assert (cache / "key" / "train.parquet").read_text() == "tokens"
    (cache / "key" / "train.parquet").unlink()
    assert not shared(third, files, cache, lambda: "key", fill(third, "again"))
    assert (cache / "key" / "train.parquet").read_text() == "again"
    assert [path.name for path in cache.iterdir()] == ["key"], "nothing half-made is left"
    assert not shared(third, files, cache, lambda: None, fill(third)) and len(made) == 3


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path: Path) -> None:
    keys = iter(["before", "after"])
    run = tmp_path / "run"
    assert not shared(run, ["x"], tmp_path / "cache", lambda: next(keys), lambda: run.mkdir())
    assert not (tmp_path / "cache").exists()
