"""On a GPU: checkpoints of its layouts go to disk and come back to the bit, by whatever algorithm they were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from samples import assert_same_parts, find_target
from tiny_models import save_plain, tiny_model
from torch import Tensor

from quantize.calibrate import Recipe
from quantize.convert import convert_checkpoint, load_plain, quantise_
from quantize.hardware import missing_for
from quantize.layers import select_layers
from quantize.schemes import SCHEMES
from quantize.simulate import simulate_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
ON_CUDA = [
    (name, target) for name, scheme in SCHEMES.items() for target, found in scheme.targets.items() if found.needs
]
IDS = torch.arange(96).reshape(4, 24) * 37 % 90 + 1


def _same_models(ours: Any, theirs: Any) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        if type(tensor) is Tensor:
            assert torch.equal(tensor, right[name]), name
        else:
            assert_same_parts(tensor, right[name])


@pytest.mark.parametrize(("scheme", "target_name"), ON_CUDA)
@pytest.mark.parametrize(("architecture", "algorithm"), [("qwen3", None), ("qwen3", "hqq"), ("qwen3_moe", None)])
def test_a_checkpoint_comes_back_to_the_bit(
    scheme: str, target_name: str, architecture: str, algorithm: str | None, tmp_path: Path
) -> None:
    chosen, target = SCHEMES[scheme], find_target(scheme, target_name)
    if missing := missing_for(target):
        pytest.skip("; ".join(missing))
    if algorithm and "fp" in scheme and scheme != "fp8-int4":
        pytest.skip("HQQ is for integers")
    size = chosen.pick_group_size(None, target)
    source = save_plain(
        tiny_model(architecture, tied=False, **SHAPE, **(EXPERTS if "moe" in architecture else {})).bfloat16(),
        tmp_path / "source",
    )
    coverage = convert_checkpoint(
        source, tmp_path / "out", chosen, target, group_size=size, dtype="bfloat16", device="cuda",
        recipe=Recipe(algorithms=[algorithm] if algorithm else []),
    )  # fmt: skip
    shipped = load_plain(tmp_path / "out", device="cuda")
    if algorithm is None:
        model = load_plain(source, dtype="bfloat16", device="cuda")
        quantise_(model, chosen, target, size, select_layers(model, chosen, size, target))
        _same_models(shipped, model)
        simulated = load_plain(source, dtype="bfloat16", device="cuda")
        simulate_(simulated, chosen, target, size, coverage)
        with torch.no_grad():
            real, expected = (each(IDS.cuda()).logits.float() for each in (shipped, simulated))
        apart = float((real - expected).norm() / expected.norm())
        print(f"@ {scheme} {target_name}: {len(coverage.layers)} layers, logits {apart:.1e} from the simulation's")
        assert apart < 0.02  # a last bit of bf16 here and there, through two blocks
    assert coverage.layers and torch.isfinite(shipped(IDS.cuda()).logits).all()
