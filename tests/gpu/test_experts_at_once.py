"""On a GPU: all experts at once compute what the loop over experts computes, values and gradients, in every format."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from samples import find_target
from tiny_models import tiny_model
from torch import Tensor, nn

from qat.experts import expert_matrices
from qat.prepare import prepare_qat
from quantize.experts import MATRICES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
}  # fmt: skip
FORMATS = [("int8-int4", "cpu"), ("int4", "cuda-sm80"), ("int4", "cpu"), ("int3", "cpu"), ("fp8", "cuda-sm89")]


def _model(rank: int, adapted: tuple[str, ...]) -> Any:
    model = tiny_model("qwen3_moe", tied=False, **SHAPE).bfloat16().cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=0.05, generator=torch.Generator("cuda").manual_seed(parameter.shape[1]))
    if not adapted:
        return model
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj"], target_parameters=list(adapted))
    model = peft.get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator("cuda").manual_seed(len(name)))
    return model


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize(("scheme", "target"), FORMATS)
@pytest.mark.parametrize("rank", [8, 4])
@pytest.mark.parametrize("placement", ["inside", "outside"])
@pytest.mark.parametrize("adapted", [MATRICES, MATRICES[1:], ()])
def test_all_at_once_is_the_loop_over_experts(
    scheme: str, target: str, rank: int, placement: str, adapted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(rank, adapted)
    group = None if scheme == "fp8" else 32
    prepared = prepare_qat(
        model, scheme, target=find_target(scheme, target), group_size=group, placement=placement, dtype=torch.bfloat16
    )
    name = next(name for name, (module, _) in prepared.layers.items() if name.endswith("experts.down_proj"))
    prepared.switch_on()
    matrix = expert_matrices(model)[name]
    hidden = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weights, chosen = torch.rand(64, 5, device="cuda").topk(2)  # never the last expert
    weights = weights.bfloat16().requires_grad_()
    trained = [p for n, p in model.named_parameters() if name.rsplit(".", 1)[0] in n and p.requires_grad]
    outputs, used = [], []
    import qat.experts

    suits = qat.experts.suits
    upstream = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    for at_once in (True, False):

        def asked(*arguments: Any, wanted: bool = at_once) -> bool:
            used.append(suits(*arguments))
            return wanted and used[-1]

        monkeypatch.setattr("qat.experts.suits", asked)
        output = matrix.outer(hidden, chosen, weights)
        grads = torch.autograd.grad(output, [hidden, weights, *trained], upstream)
        outputs.append([output, *grads])
    assert all(used[:2])
    for ours, theirs in zip(*outputs, strict=True):
        assert _apart(ours, theirs) < 2e-2, (ours.shape, _apart(ours, theirs))
