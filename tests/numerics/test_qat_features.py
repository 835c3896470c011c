"""What a model and its adapters may be in QAT: each kind trains what ships, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import IDS, gradients, logits_of, tiny_model, with_lora
from torch import nn

from qat.adapters import base_linear, merged_of, refuse_unmergeable
from qat.prepare import Prepared, prepare_qat, remove_qat
from quantize.errors import UserError
from quantize.layers import is_plain_linear, select_layers
from quantize.numerics import best_factor
from quantize.schemes import SCHEMES
from quantize.simulate import simulate_


def _prepare(model: Any, scheme: str = "int8-int4", **options: Any) -> Prepared:
    options.setdefault("group_size", 32 if SCHEMES[scheme].group_sizes else None)
    return prepare_qat(model, scheme, target=_target(scheme), **options)


def _target(scheme: str) -> str:
    return "cpu" if "cpu" in SCHEMES[scheme].targets else next(iter(SCHEMES[scheme].targets))


def _simulated(architecture: str, wrapped: Any, prepared: Prepared, scheme: str, **model: Any) -> Any:
    """The plain model, merged in float32, with the numbers of the scheme: what evaluation computes."""
    plain = tiny_model(architecture, **model)
    for name, (module, _) in prepared.layers.items():
        if name != "lm_head" or scheme == "int8-int4-mobile":
            plain.get_submodule(name).weight.data = merged_of(module).clone()
    target = SCHEMES[scheme].targets[_target(scheme)]
    group_size = 32 if SCHEMES[scheme].group_sizes else None
    coverage = select_layers(plain, SCHEMES[scheme], group_size, target)
    assert set(coverage.layers) == set(prepared.coverage.layers)
    simulate_(plain, SCHEMES[scheme], target, group_size, coverage, dict(prepared.grid()))
    return plain


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("qwen3", {}),
    "rank-stabilised": ("qwen3", {"use_rslora": True, "r": 16}),
    "dropout": ("qwen3", {"lora_dropout": 0.3}),
    "bias": ("qwen2", {}),
    "some layers": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "fused": ("phi3", {}),
    "scaled embedding": ("gemma3_text", {}),
    "none": ("qwen3", {"none": True}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int8-int4", "int8-int4-mobile", "int3", "int8"])
def test_in_eval_mode_it_is_the_simulated_merged_model_to_the_bit(kind: str, scheme: str) -> None:
    architecture, lora = KINDS[kind]
    model = tiny_model(architecture)
    wrapped = model if lora.get("none") else with_lora(model, **lora)
    before = logits_of(wrapped)
    prepared = _prepare(wrapped, scheme)
    during = logits_of(wrapped)
    assert prepared.coverage.quantized_fraction == 1.0
    assert not prepared.silent() and set(prepared.calls) == set(prepared.layers)
    assert torch.equal(during, logits_of(_simulated(architecture, wrapped, prepared, scheme)))
    assert not torch.equal(before, during)
    names = set(prepared.layers)
    if architecture == "phi3":
        assert {"model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"} <= names
    assert ("model.embed_tokens" in names and "lm_head" in names) == (scheme == "int8-int4-mobile")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_switched_off_or_removed_it_is_as_if_never_inserted(scheme: str, placement: str) -> None:
    model = with_lora(tiny_model(hidden_size=128, intermediate_size=256), lora_dropout=0.2)
    before, grads, state = logits_of(model), gradients(model), set(model.state_dict())
    size = 64 if 64 in SCHEMES[scheme].group_sizes else None
    prepared = _prepare(model, scheme, placement=placement, group_size=size)
    assert not torch.equal(before, logits_of(model))
    assert prepared.enabled and not prepared.silent()
    assert set(model.state_dict()) == state
    for end in (prepared.switch_off, prepared.switch_off, lambda: remove_qat(prepared)):
        end()
        assert not prepared.enabled
        assert torch.equal(before, logits_of(model))
        after = gradients(model)
        assert all(torch.equal(grads[name], after[name]) for name in grads) and grads.keys() == after.keys()
        assert not any("forward" in vars(module) for module in model.modules())
        assert not any(name.endswith("fake_quantizer") for name, _ in model.named_modules())


def test_switched_on_again_it_computes_the_same() -> None:
    prepared = _prepare(model := with_lora(tiny_model()))
    during = logits_of(model)
    prepared.switch_off()
    prepared.switch_on()
    prepared.switch_on()
    assert torch.equal(during, logits_of(model))


def test_outside_adds_the_adapter_to_the_quantised_base() -> None:
    model = with_lora(tiny_model())
    _prepare(model, "int3", placement="outside")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    target = SCHEMES["int3"].targets["cpu"]
    base = nn.functional.linear(x, target.numbers().round_trip(base_linear(layer).weight, 32))
    adapter = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    torch.testing.assert_close(layer(x), base + adapter)


# ---------------------------------------------------------------------- dropout


def test_dropout_keeps_the_mean() -> None:
    model = with_lora(tiny_model(), lora_dropout=0.4)
    prepared = _prepare(model, "int4")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(4, 64)
    with torch.no_grad():
        exact = layer(x)
        model.train()
        torch.manual_seed(0)
        drawn = torch.stack([layer(x) for _ in range(1000)])
    spread = drawn.std(0)
    assert (spread > 0).all()
    # The mean of 1000 draws is within 5 of its standard errors of what the merged weight gives.
    assert ((drawn.mean(0) - exact).abs() < 5 * spread / 1000**0.5).all()
    assert prepared.calls["model.layers.0.mlp.up_proj"] > 1000


@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_gradients_under_dropout_are_those_of_lora_with_the_same_mask(placement: str) -> None:
    model = with_lora(tiny_model(), lora_dropout=0.4).train()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x, upstream = torch.randn(8, 64), torch.randn(8, 128)

    def adapter_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        layer(x).backward(upstream)
        return [layer.lora_A["default"].weight.grad.clone(), layer.lora_B["default"].weight.grad.clone()]

    expected = adapter_gradients()
    _prepare(model, "int4", placement=placement)
    for ours, theirs in zip(adapter_gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- what the trainer does around it


@pytest.mark.parametrize("scheme", ["int8-int4", "int8-int4-mobile", "fp8"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(scheme: str, reentrant: bool) -> None:
    model = with_lora(tiny_model(), lora_dropout=0.3).train()
    _prepare(model, scheme)
    torch.manual_seed(1)
    plain = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(1)
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys() and any("lora_A" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("scheme", ["int8-int4", "int3", "int8", "fp8", "int8-int4-mobile"])
def test_autocast_computes_in_bf16_and_keeps_the_adapters_in_float32(scheme: str) -> None:
    model = with_lora(tiny_model())
    prepared = _prepare(model, scheme, dtype=torch.bfloat16)
    exact = gradients(model)
    cast = gradients(model, autocast=True)
    assert all(gradient.dtype == torch.float32 for gradient in cast.values())
    for name, gradient in exact.items():
        cosine = nn.functional.cosine_similarity(gradient.flatten(), cast[name].flatten(), dim=0)
        assert cosine > 0.9, f"{name}: {cosine}"
    name = "model.layers.0.mlp.up_proj"
    module, numerics = prepared.layers[name]
    x = torch.randn(7, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    quantised = numerics.quantise(merged_of(module))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, numerics.numbers.compute(x.bfloat16(), quantised, None))


@pytest.mark.parametrize("learned", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(learned: bool) -> None:
    model = with_lora(tiny_model())
    prepared = _prepare(model, "int4", learned_scales=learned)
    ids = torch.randint(5, 96, (8, 20), generator=torch.Generator().manual_seed(0))

    def collect(parts: int) -> list[torch.Tensor]:
        for parameter in [*model.parameters(), *prepared.factors.values()]:
            parameter.grad = None
        for part in ids.chunk(parts):
            (model(input_ids=part, labels=part, use_cache=False).loss / parts).backward()
        found = [*(p for p in model.parameters() if p.requires_grad), *prepared.factors.values()]
        return [parameter.grad.clone() for parameter in found]

    for whole, accumulated in zip(collect(1), collect(4), strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-3, atol=1e-5 * whole.abs().max().clamp(min=1).item())


def test_full_fine_tuning_moves_the_weights_that_ship() -> None:
    model = tiny_model()
    prepared = _prepare(model, "int3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before, losses = dict(prepared.grid()), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(prepared.grid())
    assert before.keys() == after.keys() == set(prepared.coverage.layers)
    assert all(not torch.equal(before[name].values, after[name].values) for name in after)


# ---------------------------------------------------------------------- what is refused, with the layers' names


def _other_adapter(kind: str) -> Any:
    import peft

    model = tiny_model()
    linears = ["k_proj", "v_proj", "down_proj"]
    settings = {
        "ia3": lambda: peft.IA3Config(target_modules=linears, feedforward_modules=["down_proj"]),
        "loha": lambda: peft.LoHaConfig(target_modules=linears, r=2),
        "adalora": lambda: peft.AdaLoraConfig(target_modules=linears, init_r=4, total_step=10),
        "vera": lambda: peft.VeraConfig(target_modules=["k_proj"], r=4),
    }[kind]()
    return peft.get_peft_model(model, settings)


@pytest.mark.parametrize("kind", ["ia3", "loha", "adalora", "vera"])
def test_adapters_that_are_no_lora_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.k_proj and \d more layers?: .*cannot be merged"):
        _prepare(_other_adapter(kind))


@pytest.mark.parametrize(
    ("lora", "said"),
    [({"use_dora": True}, r"set lora\.use_dora=false"), ({"lora_bias": True}, "its adapter has a bias")],
)
def test_lora_that_is_more_than_w_plus_ba_is_refused(lora: dict[str, Any], said: str) -> None:
    model = with_lora(tiny_model("qwen2"), target_modules=["q_proj", "v_proj"], **lora)
    with pytest.raises(UserError, match=rf"model\.layers\.0\.self_attn\.q_proj and 3 more layers: .*{said}"):
        _prepare(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_several_active_adapters_are_refused_and_one_of_two_is_not() -> None:
    import peft

    model = with_lora(tiny_model())
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    _prepare(model)  # "default" is the active one
    model = with_lora(tiny_model())
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UserError, match="2 active adapters"):
        _prepare(model)


def test_a_merged_adapter_is_refused() -> None:
    model = with_lora(tiny_model())
    model.merge_adapter()
    with pytest.raises(UserError, match=r"and 13 more layers: its adapter is merged already; call model\.unmerge"):
        _prepare(model)


def test_an_adapter_of_the_embedding_is_refused_where_it_is_quantised() -> None:
    with pytest.raises(UserError, match="the input embedding has an adapter"):
        _prepare(with_lora(tiny_model(tied=False), target_modules=["q_proj", "embed_tokens"]), "int8-int4-mobile")


def test_an_adapter_of_the_embedding_is_refused_before_training() -> None:
    wrapped = with_lora(tiny_model(), target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UserError, match=r"model\.embed_tokens: an adapter on an embedding is not merged"):
        refuse_unmergeable(wrapped)
    refuse_unmergeable(with_lora(tiny_model()))


def test_a_group_size_that_divides_no_layer_is_refused() -> None:
    with pytest.raises(UserError, match="group size 256 does not divide"):
        _prepare(with_lora(tiny_model()), group_size=256)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def test_fused_experts_that_a_format_does_not_reach_count_as_weights() -> None:
    coverage = select_layers(tiny_model("qwen3_moe", **MOE), SCHEMES["mxfp4"], 32)
    assert "holds no fused experts" in coverage.skipped["model.layers.0.mlp.experts.gate_up_proj"]
    assert coverage.quantized_fraction < 0.5
    dense = select_layers(tiny_model(), SCHEMES["int3"], 32)
    assert dense.quantized_fraction == 1.0 and set(dense.skipped) == {"lm_head"}


@pytest.mark.parametrize(
    ("architecture", "options"), [("qwen3_moe", MOE), ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4})]
)
def test_adapters_on_what_is_no_linear_layer_are_refused(architecture: str, options: dict[str, Any]) -> None:
    wrapped = with_lora(tiny_model(architecture, **options))
    with pytest.raises(UserError, match="an adapter on a layer that is no plain linear layer is not merged"):
        refuse_unmergeable(wrapped)


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it() -> None:
    model = with_lora(tiny_model("phimoe", num_local_experts=4, num_experts_per_tok=2), target_modules=["q_proj"])
    prepared = _prepare(model, "int3")
    assert "a router keeps 16 bit" in prepared.coverage.skipped["model.layers.0.mlp.router"]
    assert not is_plain_linear(model.get_submodule("base_model.model.model.layers.0.mlp.router"))
    assert logits_of(model).isfinite().all()


def test_an_embedding_that_computes_more_than_a_look_up_is_refused() -> None:
    model = with_lora(tiny_model("xglm", d_model=64, ffn_dim=128, num_layers=2, attention_heads=4))
    with pytest.raises(UserError, match="computes more than a look-up"):
        _prepare(model, "int8-int4-mobile")


def test_the_head_keeps_16_bit_under_whatever_name() -> None:
    coverage = select_layers(tiny_model("biogpt"), SCHEMES["int3"], 32)
    assert set(coverage.skipped) == {"output_projection"}


def _with_a_second(model: Any, **options: Any) -> Any:
    import peft

    model.add_adapter("second", peft.LoraConfig(r=2, init_lora_weights=False, **options))
    return model


def test_a_layer_without_the_active_adapter_is_a_plain_one() -> None:
    wrapped = _with_a_second(with_lora(tiny_model(), target_modules=["q_proj"]), target_modules=["v_proj"])
    wrapped.set_adapter("default")
    prepared = _prepare(wrapped, "int3")
    assert torch.equal(logits_of(wrapped), logits_of(_simulated("qwen3", wrapped, prepared, "int3")))


def test_what_peft_does_to_a_prepared_model_is_honoured_or_refused() -> None:
    wrapped = _with_a_second(with_lora(tiny_model()), target_modules="all-linear", lora_alpha=32)
    wrapped.set_adapter("default")
    wrapped.set_adapter("second")
    of_the_second = logits_of(wrapped)
    wrapped.set_adapter("default")
    prepared = _prepare(wrapped, "int3")
    before = logits_of(wrapped)
    # What trainers compare the policy with (DPO, GRPO) is the 16-bit model before the training, or a frozen adapter's.
    with wrapped.disable_adapter():
        assert torch.equal(logits_of(wrapped), logits_of(tiny_model()))
    assert torch.equal(logits_of(wrapped), before)
    with pytest.raises(UserError, match="prepared already"):
        _prepare(wrapped, "int3")
    wrapped.set_adapter("second")
    assert torch.equal(logits_of(wrapped), of_the_second)
    with pytest.raises(UserError, match="another adapter was made active after prepare_qat"):
        wrapped(input_ids=IDS)
    wrapped.set_adapter("default")
    wrapped.merge_adapter()
    with pytest.raises(UserError, match="merged after prepare_qat"):
        logits_of(wrapped)
    remove_qat(prepared)


def test_prompt_tuning_is_refused() -> None:
    import peft

    wrapped = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="no place in merged weights"):
        refuse_unmergeable(wrapped)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_least_squares_leave_the_range_of_equal_weights_alone(scheme: str) -> None:
    numbers = SCHEMES[scheme].targets[_target(scheme)].numbers()
    group_size = 64 if SCHEMES[scheme].group_sizes else None
    factor = best_factor(numbers, torch.zeros(3, 128), group_size, torch.float32)
    assert (factor == 1).all()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("shape", [(0, 128), (4, 0, 128)])
def test_an_empty_batch_gives_an_empty_output(scheme: str, shape: tuple[int, ...]) -> None:
    numbers = SCHEMES[scheme].targets[_target(scheme)].numbers()
    group_size = 128 if SCHEMES[scheme].group_sizes else None
    weight = numbers.quantise(torch.randn(96, 128), group_size, torch.float32, None)
    for bias in (None, torch.zeros(96)):
        assert numbers.compute(torch.zeros(shape), weight, bias).shape == (*shape[:-1], 96)
