"""Fused experts: trained inside the fake quantiser, merged, converted and read back, beside a plain reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qat.experts import expert_matrices
from qat.prepare import Prepared, prepare_qat, remove_qat
from quantize import experts
from quantize.convert import convert_checkpoint, load_plain
from quantize.errors import UserError
from quantize.grid import save_grid
from quantize.layers import select_layers
from quantize.schemes import Target, find_scheme
from quantize.simulate import simulate_

SHAPE = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
HELD = [("int8-int4", "cpu"), ("int4", "cpu"), ("int8", "cpu"), ("int8-int8", "cpu"), ("int3", "cpu"), ("fp8", None)]
"""Formats whose experts are quantised, at targets that this machine can compute."""
FUSED = "model.layers.1.mlp.experts"


def model_of(architecture: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SHAPE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=0.05)
    model.set_experts_implementation("eager")
    return model


def adapted(model: Any, *parameters: str) -> Any:
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj"],
        target_parameters=list(parameters),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def target_of(scheme: str, name: str | None) -> Target:
    targets = find_scheme(scheme).targets
    return targets[name] if name else next(iter(targets.values()))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def group_of(scheme: str) -> int | None:
    """32 where the format has groups: the default 128 of some divides no down_proj here."""
    return 32 if find_scheme(scheme).group_sizes else None


def prepared(model: Any, scheme: str, name: str | None, **options: Any) -> Prepared:
    return prepare_qat(model, scheme, target=target_of(scheme, name), group_size=group_of(scheme), **options)


TOKENS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("placement", ["inside", "outside"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("scheme", "target"), HELD)
def test_values_and_gradients_are_those_of_a_plain_reference(
    scheme: str, target: str | None, together: bool, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = target_of(scheme, target)
    if together and where.numbers().linear is not None:
        pytest.skip("float8's grouped product is a GPU's; integers with a scale a row have none")
    monkeypatch.setattr("qat.experts.suits", lambda *_: together)  # a GPU's way, in torch's own grouped product
    dtype = torch.bfloat16 if where.dtype else torch.float32
    model = adapted(model_of(dtype=dtype), *experts.MATRICES)
    found = prepared(model, scheme, target, placement=placement)
    numbers, group = where.numbers(), group_of(scheme)
    matrices = {leaf: expert_matrices(model)[f"{FUSED}.{leaf}"] for leaf in experts.MATRICES}
    held = matrices["down_proj"].experts
    hidden = torch.randn(9, 128, dtype=dtype).requires_grad_()
    chosen = torch.tensor([[0, 3], [1, 0], [3, 1], [0, 1], [1, 3], [3, 0], [0, 3], [1, 3], [0, 1]])  # never expert 2
    weights = torch.rand(9, 2, dtype=dtype).requires_grad_()
    parameters = [matrices[leaf].wrapper.lora_A["default"].weight for leaf in experts.MATRICES]
    parameters += [matrices[leaf].wrapper.lora_B["default"].weight for leaf in experts.MATRICES]

    class Straight(torch.autograd.Function):
        """The rounded value, and the gradient as if nothing had been rounded."""

        @staticmethod
        def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
            return rounded.to(value.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad, None

    def product(leaf: str, expert: int, inputs: Tensor) -> Tensor:
        wrapper, base = matrices[leaf].wrapper, matrices[leaf].weight[expert].float()
        lora_a, lora_b = (each["default"].weight.float() for each in (wrapper.lora_A, wrapper.lora_B))
        split_a, split_b = lora_a.reshape(4, -1, lora_a.shape[-1]), lora_b.reshape(lora_b.shape[0], -1, 4)
        delta = torch.einsum("ore, eri -> eoi", split_b, split_a)[expert] * 2  # as peft's get_delta_weight, in float32
        merged = base + delta if placement == "inside" else base
        with torch.no_grad():
            quantised = numbers.quantise(merged.detach(), group, dtype, None)
            restored = numbers.restore(quantised, dtype)
            rounded = inputs if numbers.activation is None else numbers.activation(inputs)
            value = numbers.compute(inputs, quantised, None)
        output = Straight.apply(inputs, rounded).float() @ Straight.apply(merged, restored.float()).t()
        output = output + (value.float() - output).detach()
        return output.to(dtype) if placement == "inside" else (output + inputs.float() @ delta.t()).to(dtype)

    outer = matrices["down_proj"].outer
    real = outer(hidden, chosen, weights)
    expected = experts.apply_experts(
        held, hidden, chosen, weights,
        {leaf: lambda expert, inputs, leaf=leaf: product(leaf, expert, inputs) for leaf in experts.MATRICES},
    )  # fmt: skip
    upstream = torch.randn(real.shape).to(real.dtype)
    inputs = [hidden, weights, *parameters]
    ours, theirs = (torch.autograd.grad(output, inputs, upstream) for output in (real, expected))
    # bf16 rounds what lies between the products, and may so move an input of the second to float8's next value.
    least = 5e-2 if dtype == torch.bfloat16 else 1e-5
    for found_value, wanted in zip((real, *ours), (expected, *theirs), strict=True):
        apart = (found_value.detach().float() - wanted.detach().float()).norm()
        assert float(apart / wanted.detach().float().norm()) < least
    assert {f"{FUSED}.{leaf}" for leaf in experts.MATRICES} <= set(found.calls)


@pytest.mark.parametrize("wrapped", [experts.MATRICES, experts.MATRICES[:1], experts.MATRICES[1:], ()])
@pytest.mark.parametrize(("scheme", "target"), HELD)
def test_what_is_trained_is_simulated_and_shipped_to_the_bit(
    scheme: str, target: str | None, wrapped: tuple[str, ...], tmp_path: Path
) -> None:
    where = target_of(scheme, target)
    dtype = "bfloat16" if where.dtype else "float32"
    model = adapted(model_of(dtype=getattr(torch, dtype)), *wrapped)
    qat = prepared(model, scheme, target)
    assert qat.coverage.quantized_fraction == 1.0
    trained = logits_of(model)
    assert not qat.silent() or qat.silent() == ["lm_head"]
    grid = {name: weight.compact() for name, weight in qat.grid()}
    remove_qat(qat)
    chosen = (find_scheme(scheme), where, group_of(scheme))
    merged = {name: matrix.merged() for name, matrix in expert_matrices(model).items()}
    plain = model.merge_and_unload()
    for name, weight in merged.items():
        torch.testing.assert_close(plain.get_parameter(name).float(), weight.float(), rtol=1e-2, atol=2e-3)
    plain.save_pretrained(tmp_path / "merged")
    simulated = load_plain(tmp_path / "merged", dtype=dtype)
    simulate_(simulated, *chosen, select_layers(simulated, chosen[0], chosen[2], where), grid)
    with torch.inference_mode():
        assert torch.equal(simulated(input_ids=TOKENS).logits, trained)
    (tmp_path / "grid").mkdir()
    save_grid(tmp_path / "grid", grid.items())
    coverage = convert_checkpoint(
        tmp_path / "merged", tmp_path / "shipped", chosen[0], where, group_size=chosen[2], dtype=dtype, device="cpu",
        grid=tmp_path / "grid",
    )  # fmt: skip
    assert f"{FUSED}.gate_up_proj" in coverage.layers
    shipped = load_plain(tmp_path / "shipped")
    assert type(shipped.get_submodule(FUSED).down_proj.data).__name__ in experts.TENSORS
    with torch.inference_mode():
        logits = shipped(input_ids=TOKENS).logits
    if numbers_are_exact(scheme):
        assert torch.equal(logits, trained)
    else:
        assert float((logits - trained).norm() / trained.norm()) < 0.01
    for leaf in experts.MATRICES:
        loaded = shipped.get_parameter(f"{FUSED}.{leaf}").data
        parts = experts.split(grid[f"{FUSED}.{leaf}"], len(loaded))
        made = experts.stack([where.tensor(part, getattr(torch, dtype)) for part in parts])
        for part in type(made).tensor_data_names:
            assert torch.equal(getattr(made, part), getattr(loaded, part))
        assert list(loaded.block_size) == list(made.block_size) and loaded.dtype == made.dtype


def numbers_are_exact(scheme: str) -> bool:
    """Of the formats here only fp8 and int8-int8 compute in kernels of their own on a CPU."""
    return scheme not in ("fp8", "int8-int8")


def test_switched_off_it_computes_what_peft_computes() -> None:
    model = adapted(model_of(), *experts.MATRICES)
    before = logits_of(model)
    qat = prepared(model, "int8-int4", "cpu")
    assert not torch.equal(model(input_ids=TOKENS).logits, before)
    qat.switch_off()
    assert torch.equal(model(input_ids=TOKENS).logits, before)
    qat.switch_on()
    with model.disable_adapter():
        bare = logits_of(model)
    assert torch.equal(bare, logits_of(model_of()))  # the reference of preference training keeps 16 bit


def test_merged_weights_are_those_that_peft_merges() -> None:
    model = adapted(model_of(), *experts.MATRICES)
    merged = {name: matrix.merged() for name, matrix in expert_matrices(model).items()}
    plain = model.merge_and_unload()
    assert len(merged) == 4
    for name, weight in merged.items():
        torch.testing.assert_close(weight, plain.get_parameter(name), rtol=1e-6, atol=1e-6)


def test_a_full_fine_tuning_trains_the_experts_that_are_reached() -> None:
    model = model_of()
    prepared(model, "int8-int4", "cpu")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradient = model.get_parameter(f"{FUSED}.down_proj").grad
    assert gradient.shape == (4, 128, 64) and gradient.abs().sum() > 0


def test_learned_ranges_belong_to_each_expert() -> None:
    model = adapted(model_of(), *experts.MATRICES)
    qat = prepared(model, "int8-int4", "cpu", learned_scales=True, ranges="mse")
    factor = qat.factors[f"{FUSED}.down_proj"]
    assert factor.shape == (4 * 128, 2) and (factor < 1).any()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert factor.grad is not None and factor.grad.abs().sum() > 0
    trained = logits_of(model)
    grid = dict(qat.grid())
    remove_qat(qat)
    plain = model.merge_and_unload()
    chosen = (find_scheme("int8-int4"), target_of("int8-int4", "cpu"), 32)
    simulate_(plain, *chosen, select_layers(plain, chosen[0], chosen[2], chosen[1]), grid)
    assert torch.equal(plain(input_ids=TOKENS).logits, trained)


def test_routers_keep_16_bit_and_the_share_of_all_weights_is_said() -> None:
    model = model_of()
    chosen = (find_scheme("int8-int4"), target_of("int8-int4", "cpu"), 32)
    coverage = select_layers(model, chosen[0], 32, chosen[1])
    assert coverage.skipped["model.layers.0.mlp.gate"].startswith("a router keeps 16 bit")
    quantised = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and "layers" in n and "gate." not in n
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    assert coverage.as_dict()["share_of_all_weights"] == quantised / total
    kept = select_layers(model, chosen[0], 32, chosen[1], ["experts"])
    assert kept.skipped[f"{FUSED}.down_proj"] == "quantize.skip leaves it unquantised" and kept.reached_fraction == 1.0
    narrow = select_layers(model, chosen[0], 128, chosen[1])
    assert narrow.skipped[f"{FUSED}.down_proj"] == "group size 128 does not divide its in_features 64"
    blocks = select_layers(model, find_scheme("nvfp4"), 16, find_scheme("nvfp4").targets["cpu"])
    assert "holds no fused experts" in blocks.skipped[f"{FUSED}.down_proj"]


def test_other_architectures_with_fused_experts_are_reached() -> None:
    for architecture in ("olmoe", "qwen2_moe"):
        model = model_of(architecture)
        before = logits_of(model)
        qat = prepared(model, "int8-int4", "cpu")
        assert any(name.endswith("experts.down_proj") for name in qat.layers)
        found = logits_of(model)
        assert 0 < float((found - before).norm() / before.norm()) < 1 and not qat.silent()


def test_what_is_no_expert_is_refused() -> None:
    model = peft.get_peft_model(
        model_of(), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate.weight"])
    )
    from qat.adapters import refuse_unmergeable

    with pytest.raises(UserError, match=r"mlp\.gate and 1 more: an adapter on a layer that is no plain linear layer"):
        refuse_unmergeable(model)
    merged = adapted(model_of(), *experts.MATRICES)
    merged.merge_adapter()
    with pytest.raises(UserError, match="its adapter is merged already"):
        prepared(merged, "int8-int4", "cpu")


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="eager")
with torch.no_grad():
    print(float(model(input_ids=torch.arange(9)[None]).logits.float().norm()))
"""


@pytest.mark.parametrize(("scheme", "target"), [("int8", "cpu"), ("fp8", None)])
def test_plain_transformers_runs_the_experts_of_a_checkpoint(scheme: str, target: str | None, tmp_path: Path) -> None:
    where = target_of(scheme, target)
    dtype = "bfloat16" if where.dtype else "float32"
    model_of(dtype=getattr(torch, dtype)).save_pretrained(tmp_path / "plain")
    convert_checkpoint(
        tmp_path / "plain", tmp_path / "small", find_scheme(scheme), where, group_size=None, dtype=dtype, device="cpu"
    )
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "small")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.inference_mode():
        ours = load_plain(tmp_path / "small")(input_ids=torch.arange(9)[None]).logits.float().norm()
    assert float(done.stdout.split()[-1]) == pytest.approx(float(ours), rel=1e-6)


def test_experts_whose_class_was_rebuilt_without_its_marks_are_known() -> None:
    """Unsloth does so on CUDA: no has_gate, no _apply_gate."""
    model = adapted(model_of(), *experts.MATRICES)
    prepared(model, "int8-int4", "cpu")
    expected = logits_of(model)
    model = adapted(model_of(), *experts.MATRICES)
    for _, module in experts.fused_experts(model):
        for mark in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts"):
            delattr(module, mark)
        module.__class__ = type("Rebuilt", (nn.Module,), {"forward": lambda self: None})
    found = prepared(model, "int8-int4", "cpu")
    assert found.coverage.quantized_fraction == 1.0
    assert torch.equal(logits_of(model), expected)
