"""Steps of the architectures that people ship are captured and compiled on a GPU, in 16 bit and quantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from quantize.convert import quantise_
from quantize.layers import select_layers
from quantize.schemes import find_scheme
from quantize.timing import StepTimer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = 64
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
        "original_max_position_embeddings": 4096,
    },
    "original_max_position_embeddings": 4096,
}  # fmt: skip
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8}
CASES = {
    "qwen3": SHAPE,
    "llama": SHAPE,
    "smollm3": SHAPE,
    "gemma3_text": SHAPE | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {name: value for name, value in SHAPE.items() if name != "head_dim"} | LONGROPE,
}


def _shipped(architecture: str, name: str | None) -> Any:
    model = tiny_model(architecture, **CASES[architecture]).to("cuda", torch.bfloat16)
    if name is not None:
        scheme = find_scheme(name)
        target = next(target for target in scheme.targets.values() if "cuda" in target.name)
        quantise_(model, scheme, target, scheme.group_size, select_layers(model, scheme, scheme.group_size, target))
    return model


@pytest.mark.parametrize(
    ("architecture", "name"),
    [*((architecture, None) for architecture in CASES), *(("qwen3", name) for name in ("int4", "fp8", "int8-int4"))],
)
def test_a_decoding_step_is_captured_and_compiled(architecture, name):
    with StepTimer(_shipped(architecture, name)) as timer:
        assert timer.compiled
        assert timer.decode_ms(2, TOKENS) > 0
        with torch.inference_mode():
            step = timer.decoding_step(2, TOKENS)
            torch.manual_seed(0)
            plain = step().float()
            timer._compile(True)
            compiled = step().float()
    assert (
        compiled - plain
    ).norm() / plain.norm() < 0.1  # fused otherwise; fp8 then rounds some to its next number, 6%


@pytest.mark.parametrize("architecture", CASES)
def test_a_prefill_is_captured_and_compiled(architecture):
    with StepTimer(_shipped(architecture, None)) as timer:
        assert timer.prefill_ms(2, TOKENS) > 0
