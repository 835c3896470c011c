"""The merged checkpoint computes what the trained model computes, for each kind of adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.convert import load_plain
from train.backends.peft import PeftBackend
from train.config import LoraConfig, ModelConfig
from train.fit import Learner
from train.merge import write_merged
from train.models import resolve_model


def _trained(folder: Path, lora: LoraConfig) -> Any:
    """A tiny model with adapters that are no longer zero."""
    backend = PeftBackend()
    model = backend.load(folder, _settings(), dtype="float32", max_length=64, full=False)
    model = backend.add_lora(model, lora, seed=0, gradient_checkpointing=False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "magnitude" in name else 0.0, std=0.1)
    return model.eval()


def _settings() -> ModelConfig:
    return ModelConfig(id="random", random="tiny", architecture="qwen3")


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=4),
        LoraConfig(r=4, lora_alpha=32, use_rslora=True),
        LoraConfig(r=4, lora_dropout=0.3),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        LoraConfig(r=4, use_dora=True),
    ],
    ids=["plain", "rank-stabilised", "dropout", "some-layers", "dora"],
)
def test_merged_weights_give_the_same_logits(lora: LoraConfig, tmp_path: Path) -> None:
    source = resolve_model(_settings(), cache=tmp_path, seed=0).folder
    model = _trained(source, lora)
    ids = torch.arange(5, 45).reshape(2, 20)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected, untouched = model(input_ids=ids).logits, load_plain(source, dtype="float32")(input_ids=ids).logits
        output = tmp_path / "merged"
        output.mkdir()
        write_merged(
            Learner(model=model, prepared=None, dtype="float32", backend=PeftBackend()),
            source,
            output,
            dtype="float32",
            settings=_settings(),
        )
        merged = load_plain(output, dtype="float32")(input_ids=ids).logits
    assert not torch.allclose(expected, untouched, atol=1e-2)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_weights_are_rounded_once_to_the_dtype_that_ships(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = resolve_model(_settings(), cache=tmp_path, seed=0).folder
    model = _trained(source, LoraConfig(r=4))
    output = tmp_path / "merged"
    output.mkdir()
    write_merged(
        Learner(model=model, prepared=None, dtype="float32", backend=PeftBackend()),
        source,
        output,
        dtype="bfloat16",
        settings=_settings(),
    )
    stored = load_file(output / "model.safetensors")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    exact = layer.base_layer.weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    torch.testing.assert_close(stored["model.layers.0.mlp.down_proj.weight"].float(), exact, rtol=2**-8, atol=1e-8)
    assert "lm_head.weight" in stored or model.config.tie_word_embeddings
