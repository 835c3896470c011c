"""On a GPU: training with the fused kernels follows training by the definition of the numbers.

`pytest -m gpu tests/gpu/test_fused_training.py`
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import tiny_model, with_lora

from qat.kernels import FusedPath
from qat.layer import LayerNumerics
from qat.prepare import Prepared, prepare_qat

pytest.importorskip("triton", reason="the kernels are Triton's")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 20
NOISE = 0.02
"""Nats: a sum in another order is another bf16 number here and there, and rounding makes steps of some of them."""


def _losses(scheme: str, *, fused: bool) -> tuple[list[float], Prepared]:
    """Of `STEPS` steps on four batches of random tokens, which a rank of 16 learns by heart."""
    model = tiny_model(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=512, initializer_range=0.02)
    model = with_lora(model, r=16).to("cuda", torch.bfloat16).train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    prepared = prepare_qat(model, scheme, dtype=torch.bfloat16, fused=fused)
    optimiser = torch.optim.AdamW(adapters, lr=2e-3)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 512, (4, 128), generator=generator).to("cuda") for _ in range(4)]

    def steps() -> Iterator[float]:
        for step in range(STEPS):
            ids = batches[step % len(batches)]
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            yield loss.item()

    return list(steps()), prepared


@pytest.mark.parametrize("scheme", ["int8-int4", "int4", "int8", "fp8"])
def test_the_fused_kernels_train_what_the_definition_trains(scheme: str) -> None:
    if scheme == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that computes in float8")
    fused, prepared = _losses(scheme, fused=True)
    plain, by_definition = _losses(scheme, fused=False)
    weight = torch.empty(0, device="cuda", dtype=torch.bfloat16)

    def is_fused(numerics: LayerNumerics) -> bool:
        return isinstance(numerics.path(weight, torch.bfloat16), FusedPath)

    assert all(is_fused(numerics) for _, numerics in prepared.layers.values())
    assert not any(is_fused(numerics) for _, numerics in by_definition.layers.values())
    for both in (prepared, by_definition):
        assert not both.silent()
        assert set(both.calls.values()) == {STEPS}
    assert plain[0] - plain[-1] > 20 * NOISE, "it trains"
    assert fused == pytest.approx(plain, abs=NOISE)
