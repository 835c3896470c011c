"""Values and gradients of the QAT linear against plain autograd through the same numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qat.linear import FakeQuantLinear, FakeQuantSwitch, LayerNumerics, merged_weight
from qat.prepare import prepare_qat, remove_qat
from quantize.errors import UserError
from quantize.schemes import SCHEMES

CASES = [(name, target) for name, scheme in SCHEMES.items() for target in scheme.targets]


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


@pytest.mark.parametrize(("name", "target_name"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_equal_the_reference(name: str, target_name: str, seed: int) -> None:
    target, group = SCHEMES[name].targets[target_name], 32
    torch.manual_seed(seed)
    weight = torch.randn(48, 64)
    lora_a, lora_b = torch.randn(4, 64) * 0.1, torch.randn(48, 4) * 0.1
    x, bias, upstream = torch.randn(2, 3, 64), torch.randn(48), torch.randn(2, 3, 48) * 1e-3
    leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_a, lora_b, bias)]
    twins = [tensor.clone().requires_grad_() for tensor in (x, lora_a, lora_b, bias)]
    numerics = LayerNumerics(
        name="layer",
        weight=partial(target.weight, group_size=group),
        activation=target.activation,
        merged_dtype=torch.float32,
        scaling=2.0,
        switch=FakeQuantSwitch(),
    )
    output = FakeQuantLinear.apply(leaves[0], weight, leaves[1], leaves[2], leaves[3], numerics)
    output.backward(upstream)
    merged = torch.addmm(weight, twins[2], twins[1], alpha=2.0)
    rounded = _straight_through(merged, target.weight(merged.detach(), group))
    inputs = (
        twins[0] if target.activation is None else _straight_through(twins[0], target.activation(twins[0].detach()))
    )
    expected = nn.functional.linear(inputs, rounded, twins[3])
    expected.backward(upstream)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(leaves, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_full_fine_tuning_has_the_dense_gradient() -> None:
    target = SCHEMES["int8-int4"].targets["cpu"]
    weight, x = torch.randn(16, 32, requires_grad=True), torch.randn(5, 32)
    numerics = LayerNumerics(
        name="layer", weight=partial(target.weight, group_size=32), activation=target.activation,
        merged_dtype=torch.float32, scaling=1.0, switch=FakeQuantSwitch(),
    )  # fmt: skip
    FakeQuantLinear.apply(x, weight, None, None, None, numerics).sum().backward()
    assert target.activation is not None
    torch.testing.assert_close(weight.grad, torch.ones(5, 16).t() @ target.activation(x))


def _peft_model(**lora: object) -> nn.Module:
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=97, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **lora)  # type: ignore[arg-type]
    return peft.get_peft_model(model, settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_removal_is_exact_and_every_layer_runs(name: str, placement: str) -> None:
    model = _peft_model().eval()
    ids = torch.arange(12).reshape(1, 12)
    before, names = model(input_ids=ids).logits, set(model.state_dict())
    prepared = prepare_qat(model, name, group_size=None if name == "fp8" else 32, placement=placement)
    during = model(input_ids=ids).logits
    assert prepared.switch.seen == set(prepared.coverage.layers)
    assert set(model.state_dict()) == names
    assert not torch.equal(before, during)
    remove_qat(prepared)
    assert torch.equal(before, model(input_ids=ids).logits)


def test_switched_off_it_is_the_merged_16_bit_model() -> None:
    model = _peft_model().eval()
    prepared = prepare_qat(model, "int8-int4")
    prepared.switch.enabled = False
    ids = torch.arange(12).reshape(1, 12)
    inside = model(input_ids=ids).logits
    remove_qat(prepared)
    merged = model.merge_and_unload()  # type: ignore[operator]
    assert torch.allclose(inside, merged(input_ids=ids).logits, atol=1e-5)


def test_merge_rounds_the_sum_once() -> None:
    weight, lora_a, lora_b = torch.randn(8, 8).bfloat16(), torch.randn(2, 8), torch.randn(8, 2)
    expected = (weight.float() + 0.5 * (lora_b @ lora_a)).bfloat16()
    assert torch.allclose(
        merged_weight(weight, lora_a, lora_b, 0.5, torch.bfloat16).float(), expected.float(), rtol=1e-2
    )
    assert merged_weight(weight, None, None, 1.0, torch.bfloat16) is weight


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_what_cannot_go_inside_is_refused(lora: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"set lora\."):
        prepare_qat(_peft_model(**lora), "int8-int4")


def test_a_group_size_that_divides_no_layer_is_refused() -> None:
    with pytest.raises(UserError, match="group size 256 does not divide"):
        prepare_qat(_peft_model(), "int8-int4", group_size=256)
