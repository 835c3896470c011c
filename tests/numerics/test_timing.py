"""What is timed is what the model computes: a prompt, and a decoding step behind a full cache."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from quantize.convert import quantise_
from quantize.layers import select_layers
from quantize.schemes import find_scheme
from quantize.timing import StepTimer

TOKENS = 24
ARCHITECTURES = ("llama", "qwen3", "phi3", "smollm3", "gemma3_text", "gpt2")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_decoding_step_computes_the_models_next_logits(architecture):
    from transformers import DynamicCache

    model = tiny_model(architecture)
    with StepTimer(model, compiled=True) as timer:
        step = timer.decoding_step(3, TOKENS)
        step()  # makes the cache
        ids = torch.randint(2, 96, (3, TOKENS), generator=torch.Generator().manual_seed(0))
        ids[:, -1:] = timer._random_ids(3, 1)
        cache = DynamicCache(config=model.config)
        for slot in timer._slots:
            slot.keys.zero_()
        found = step()
    expected = model(input_ids=ids, use_cache=False).logits[:, -1:]
    assert not torch.allclose(found, expected, atol=1e-4), "the prefix must matter"
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    with StepTimer(model) as timer:
        step = timer.decoding_step(3, TOKENS)
        step()
        for slot, layer in zip(timer._slots, cache.layers, strict=True):
            slot.keys[:, :, :-1], slot.values[:, :, :-1] = layer.keys, layer.values
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=5e-5)  # and again


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_prefill_computes_the_models_logits_and_leaves_it_as_it_was(architecture):
    model = tiny_model(architecture)
    with StepTimer(model) as timer:
        found = timer.prefill(2, TOKENS)()
        ids = timer._random_ids(2, TOKENS)
    torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits[:, -1:], rtol=1e-4, atol=5e-5)
    assert not any("forward" in vars(module) for module in model.modules())
    other = ids[:, : TOKENS // 2]  # other positions, other masks
    assert torch.equal(model(input_ids=other).logits, tiny_model(architecture)(input_ids=other).logits)


def test_a_quantised_model_is_timed():
    model = tiny_model("qwen3")
    scheme = find_scheme("int8-int4")
    quantise_(model, scheme, scheme.find_target("cpu"), 32, select_layers(model, scheme, 32))
    with StepTimer(model) as timer:
        assert timer.decode_ms(2, TOKENS) > 0
        assert timer.prefill_ms(1, TOKENS) > 0
        assert not timer.compiled


def test_a_model_whose_layers_cannot_be_told_is_refused():
    model = tiny_model("qwen3")
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="Qwen3ForCausalLM holds its decoder layers"):
        StepTimer(model)
