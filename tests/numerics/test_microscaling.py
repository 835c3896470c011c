"""NVFP4, MXFP8 and MXFP4: the numbers of `quantize.microscaling` are those of torchao's tensors, to the bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from samples import DTYPES, assert_same_parts, find_target, hard_weight, parts_of, torchao_layer
from tiny_models import logits_of, save_plain, tiny_model, with_lora
from torch import nn

from qat.layer import LayerNumerics, Projection
from qat.linear import fake_quant_linear
from qat.prepare import prepare_qat
from quantize import microscaling
from quantize.convert import load_plain, quantise_
from quantize.layers import select_layers
from quantize.schemes import SCHEMES
from quantize.simulate import simulate_

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SHAPES = [(96, 256), (144, 512), (32, 96)]


def _numbers_in(element: str) -> tuple[microscaling.Numbers, int]:
    return SCHEMES[element].targets["cuda-sm100"].numbers(), SCHEMES[element].group_size or 0


def test_fp4_is_the_nearest_number_and_ties_go_to_the_even_one() -> None:
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked

    middles = (FP4[1:] + FP4[:-1]) / 2
    edges = torch.cat([FP4, middles, middles.nextafter(FP4[1:]), middles.nextafter(FP4[:-1]), FP4.new_tensor([7, 1e9])])
    values = torch.cat([edges, -edges, torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3])
    ours = microscaling.round_to_fp4(values).float()
    assert torch.equal(ours, f4_unpacked_to_f32(f32_to_f4_unpacked(values)))
    assert torch.equal(torch.signbit(ours), torch.signbit(values))
    every = torch.cat([-FP4.flip(0), FP4])
    assert torch.equal((ours - values).abs(), (values.clamp(-6, 6).unsqueeze(-1) - every).abs().amin(-1)
                       + (values.abs() - 6).clamp(min=0))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4"])
def test_mx_weights_and_layers_equal_torchao_to_the_bit(scheme: str, dtype: torch.dtype) -> None:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    numbers, target = find_target(scheme, "cpu").numbers(), find_target(scheme, "cpu")
    for seed, shape in enumerate(SHAPES):
        weight = hard_weight(seed, shape, dtype)
        quantised = numbers.quantise(weight, 32, dtype, None)
        ours = target.tensor(quantised, dtype)
        theirs = MXTensor.to_mx(
            weight, ours.elem_dtype, 32, ScaleCalculationMode.RCEIL, ours.kernel_preference, ours.act_quant_kwargs, True
        )
        assert_same_parts(ours, theirs)
        restored = numbers.restore(quantised, dtype)
        assert torch.equal(ours.dequantize(), restored) and torch.equal(restored, numbers.round_trip(weight, 32))
        assert not restored[0].any() and restored[5].any() and not restored[7].any()
        if dtype == torch.bfloat16:  # what its config takes
            assert_same_parts(ours, torchao_layer(weight, target, 32).weight.data)
        for inputs in (
            hard_weight(seed + 1, (12, shape[1]), dtype).reshape(3, 4, -1),
            torch.randn(1, shape[1]).to(dtype),
        ):
            for bias in (None, torch.randn(shape[0]).to(dtype)):
                layer = nn.Linear(shape[1], shape[0], bias=bias is not None, dtype=dtype)
                layer.weight = nn.Parameter(ours, requires_grad=False)
                if bias is not None:
                    layer.bias.data = bias
                expected = numbers.compute(inputs, quantised, bias)
                torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvfp4_weights_equal_torchao_to_the_bit(dtype: torch.dtype) -> None:
    target = find_target("nvfp4", "cpu")
    numbers = target.numbers()
    for seed, shape in enumerate(SHAPES):
        weight = hard_weight(seed, shape, dtype)
        weight[5] = weight[9]  # a row of 1e30 would make the rest zero: see the next test
        for part in (weight, weight[10:26], weight[10:26] * 1e30, weight[10:26] * 1e-30):
            quantised = numbers.quantise(part, 16, dtype, None)
            layer = torchao_layer(part, target, 16)
            assert_same_parts(target.tensor(quantised, dtype), layer.weight.data)
            assert torch.equal(layer.weight.dequantize(), numbers.round_trip(part, 16))
            inputs, bias = torch.randn(2, 3, shape[1]).to(dtype), torch.randn(part.shape[0]).to(dtype)
            with_bias = torchao_layer(part, target, 16, bias)(inputs)
            assert torch.equal(with_bias, numbers.compute(inputs, quantised, bias))
        assert not numbers.round_trip(weight, 16)[0].any()


def test_nvfp4_of_a_tensor_that_has_no_scale_is_zero() -> None:
    numbers = find_target("nvfp4", "cpu").numbers()
    for weight in (torch.zeros(16, 32), torch.full((16, 32), 1e-37)):
        assert torch.equal(numbers.round_trip(weight, 16), torch.zeros(16, 32))
    huge = hard_weight(0)
    assert numbers.round_trip(huge, 16)[5].any() and not numbers.round_trip(huge, 16)[10].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvfp4_with_dynamic_activations_is_torchao_s_formula(dtype: torch.dtype) -> None:
    """Weights and inputs to the bit against its tensors; the product, which runs on Blackwell alone, as it is read."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    target = find_target("nvfp4", "cuda-sm100")
    numbers = target.numbers()
    weight, inputs = torch.randn(48, 128).to(dtype) * 0.05, torch.randn(2, 3, 128).to(dtype)
    inputs[0, 1], inputs[1, 2, 7] = 0, 60
    bias = torch.randn(48).to(dtype)
    quantised = numbers.quantise(weight, 16, dtype, None)
    sides = []
    for tensor, ours in (
        (weight, quantised),
        (inputs.reshape(6, -1), microscaling.quantise_nvfp4(inputs.reshape(6, -1))),
    ):
        theirs = NVFP4Tensor.to_nvfp4(
            tensor, per_tensor_scale=per_tensor_amax_to_scale(tensor.abs().max()), is_swizzled_scales=True
        )
        built, _ = parts_of(find_target("nvfp4", "cpu").tensor(ours, dtype))
        expected, _ = parts_of(theirs)
        assert built.keys() == expected.keys()
        assert all(
            torch.equal(built[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in ("qdata", "scale")
        )
        assert torch.equal(built["per_tensor_scale"], expected["per_tensor_scale"])
        scales, theirs.per_tensor_scale = theirs.per_tensor_scale, None
        sides.append((theirs.dequantize(torch.float32), scales))
    assert numbers.activation is not None
    assert torch.equal(numbers.activation(inputs).reshape(6, -1), NVFP4Tensor.to_nvfp4(
        inputs.reshape(6, -1), per_tensor_scale=sides[1][1]).dequantize())  # fmt: skip
    summed = (sides[1][0] @ sides[0][0].t()).to(dtype)
    expected_output = summed * (sides[1][1] * sides[0][1]).to(dtype) + bias
    assert torch.equal(numbers.compute(inputs, quantised, bias), expected_output.reshape(2, 3, 48))
    plain = nn.functional.linear(inputs.float(), weight.float(), bias.float())
    assert (expected_output.reshape(2, 3, 48).float() - plain).norm() < 0.2 * plain.norm()


@pytest.mark.parametrize("scheme", ["mxfp8", "nvfp4"])
def test_gradients_pass_the_round_trips_unchanged(scheme: str) -> None:
    """dX = dY Wq, dA = s (dY B)^T Xq, dB = s dY^T (Xq A^T): of the rounded weight and the rounded input."""
    numbers, group_size = _numbers_in(scheme)
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=draw) for shape in ((2, 3, 64), (48, 64)))
    lora_a, lora_b = (torch.randn(*shape, generator=draw) * 0.1 for shape in ((4, 64), (48, 4)))
    grad = torch.randn(2, 3, 48, generator=draw)
    for leaf in (x, lora_a, lora_b):
        leaf.requires_grad_()
    numerics = LayerNumerics(
        name="layer", numbers=numbers, group_size=group_size, dtype=torch.float32, scaling=2.0, calls=Counter()
    )
    output = fake_quant_linear(x, Projection(weight, lora_a, lora_b, None, None), numerics)
    output.backward(grad)
    quantised = numerics.quantise(weight, lora_a.detach(), lora_b.detach())
    assert torch.equal(output, numbers.compute(x.detach(), quantised, None))
    assert numbers.activation is not None
    shipped, seen = numbers.restore(quantised, torch.float32), numbers.activation(x.detach()).reshape(6, 64)
    rows = grad.reshape(6, 48)
    for found, expected in (
        (x.grad, (rows @ shipped).reshape(x.shape)),
        (lora_a.grad, 2.0 * (rows @ lora_b.detach()).t() @ seen),
        (lora_b.grad, 2.0 * rows.t() @ (seen @ lora_a.detach().t())),
    ):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["mxfp8", "nvfp4", "int8-int8"])
def test_a_tiny_model_trains_with_the_numbers_that_ship(scheme: str) -> None:
    model = with_lora(tiny_model())
    prepared = prepare_qat(model, scheme)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(5, 45).reshape(2, 20)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0] and not prepared.silent()
    plain = tiny_model()
    target, size = next(iter(SCHEMES[scheme].targets.values())), SCHEMES[scheme].group_size
    simulate_(plain, SCHEMES[scheme], target, size, prepared.coverage, dict(prepared.grid()))
    assert torch.equal(logits_of(plain), logits_of(model))


REBUILT = [
    ("int8-int8", "cpu"),
    ("int8", "cpu-intx"),
    ("int6", "cpu"),
    ("int8-int4", "executorch"),
    *((scheme, target) for scheme in ("mxfp8", "mxfp4", "nvfp4") for target in ("cpu", "cuda-sm100")),
]


@pytest.mark.parametrize(("scheme", "target_name"), REBUILT)
def test_a_checkpoint_is_what_was_saved_to_the_bit(scheme: str, target_name: str, tmp_path: Path) -> None:
    target = find_target(scheme, target_name)
    size = SCHEMES[scheme].pick_group_size(None, target)
    model = tiny_model(num_hidden_layers=1, layer_types=["full_attention"])
    model = model.bfloat16() if target.dtype == "bfloat16" else model
    source = save_plain(model, tmp_path / "source")
    dtype = target.dtype or "float32"
    made = load_plain(source, dtype=dtype)
    coverage = select_layers(made, SCHEMES[scheme], size, target)
    assert coverage.quantized_fraction == 1.0
    quantise_(made, SCHEMES[scheme], target, size, coverage)
    made.save_pretrained(tmp_path / "made")
    found = load_plain(tmp_path / "made")
    for name in coverage.layers:
        ours, theirs = made.get_submodule(name).weight.data, found.get_submodule(name).weight.data
        assert_same_parts(theirs, ours)
    if target_name == "cuda-sm100":
        return  # no other machine multiplies it
    simulated = load_plain(source, dtype=dtype)
    simulate_(simulated, SCHEMES[scheme], target, size, coverage)
    expected = logits_of(made)
    assert torch.equal(logits_of(found), expected) and torch.equal(logits_of(simulated), expected)
