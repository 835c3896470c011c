"""The numbers of `quantize.numerics` are those of torchao's tensors, to the bit: weights, layers, what ships."""

from __future__ import annotations

import pytest
import torch
from samples import (
    DTYPES,
    EVERY_TARGET,
    assert_same_parts,
    find_target,
    group_sizes,
    hard_weight,
    same_bits,
    torchao_layer,
)
from torch import Tensor, nn

from quantize import float8, integers, microscaling
from quantize.schemes import SCHEMES

BLOCKS = ("mxfp8", "mxfp4", "nvfp4")
"""Formats of tests/numerics/test_microscaling.py."""
HERE = [
    *((name, target) for name, target in EVERY_TARGET if target in ("cpu", "cpu-intx") and name not in BLOCKS),
    ("int8-int4-mobile", "embedding"),
]
"""What torchao builds on a CPU. Its twin for CUDA has the same numbers; tests/gpu shows that it stores the same."""


CASES = [(*case, group_size) for case in HERE for group_size in group_sizes(*case)]


def test_all_of_them_are_here() -> None:
    intx = {f"int{bits}" for bits in range(2, 9)}
    assert {name for name, _ in HERE} == intx | {"int8-int4", "int8-int4-mobile", "int8-int8"}
    assert {name for name, scheme in SCHEMES.items() if not set(scheme.targets) & {"cpu"}} == {"fp8", "fp8-int4"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "target_name", "group_size"), CASES)
def test_weights_and_layers_equal_torchao_to_the_bit(
    scheme: str, target_name: str, group_size: int | None, dtype: torch.dtype
) -> None:
    target = find_target(scheme, target_name)
    numbers = target.numbers()
    for seed, shape in enumerate([(96, 256), (17, 512), (160, 768), (64, 256)]):
        weight, bias = hard_weight(seed, shape, dtype), torch.randn(shape[0]).to(dtype)
        quantised = numbers.quantise(weight, group_size, dtype, None)
        layer = torchao_layer(weight, target, group_size)
        assert_same_parts(target.tensor(quantised, dtype), layer.weight.data)
        assert torch.equal(layer.weight.dequantize(), numbers.round_trip(weight, group_size))
        assert torch.equal(target.tensor(quantised, dtype).dequantize(), numbers.restore(quantised, dtype))
        if target_name == "embedding":
            ids = torch.arange(shape[0]).flip(0)
            assert torch.equal(layer(ids), numbers.restore(quantised, dtype)[ids])
            continue
        for inputs in (
            hard_weight(seed + 1, (15, shape[1]), dtype).reshape(3, 5, -1),
            torch.randn(1, shape[1]).to(dtype),
        ):
            for some_bias in (None, bias):
                real = torchao_layer(weight, target, group_size, some_bias)(inputs)
                # huge weights times huge inputs overflow alike on both sides
                expected = numbers.compute(inputs, quantised, some_bias)
                torch.testing.assert_close(real, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_cuda_twin_of_a_cpu_target_has_its_numbers(name: str) -> None:
    targets = SCHEMES[name].targets
    for cpu in {"cpu", "cpu-intx"} & targets.keys():
        cuda = cpu.replace("cpu", "cuda")
        assert targets[cuda].numbers() is targets[cpu].numbers()
        group_size = group_sizes(name, cpu)[0]
        assert repr(targets[cuda].config(group_size)) == repr(targets[cpu].config(group_size))


@pytest.mark.parametrize(("scheme", "target_name"), EVERY_TARGET)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_of_1_changes_nothing(scheme: str, target_name: str, dtype: torch.dtype) -> None:
    numbers = find_target(scheme, target_name).numbers()
    group_size = group_sizes(scheme, target_name)[0]
    weight = hard_weight(3, dtype=dtype)
    plain = numbers.quantise(weight, group_size, dtype, None)
    factored = numbers.quantise(weight, group_size, dtype, torch.ones(plain.scale.shape))
    # An asymmetric range is written around its middle there, whose sum rounds once more.
    if plain.zero is None:
        assert same_bits(plain.values, factored.values) and torch.equal(plain.scale, factored.scale)
    else:
        ordinary = slice(10, None)
        error = (numbers.restore(plain, dtype) - numbers.restore(factored, dtype))[ordinary].abs().amax()
        assert error <= plain.scale[ordinary].amax() * 1.01


@pytest.mark.parametrize("scheme", ["int8-int4", "int8-int4-mobile"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_executorch_s_scales_are_bf16_numbers_and_its_layer_computes_with_them(scheme: str, dtype: torch.dtype) -> None:
    target, plain = find_target(scheme, "executorch"), find_target(scheme, "cpu")
    numbers = target.numbers()
    for seed in range(3):
        weight, inputs = hard_weight(seed, dtype=dtype), hard_weight(seed + 1, (15, 256), dtype).reshape(3, 5, -1)
        quantised = numbers.quantise(weight, 32, dtype, None)
        assert quantised.scale.dtype == dtype and torch.equal(quantised.scale, quantised.scale.bfloat16().to(dtype))
        in_bf16 = plain.numbers().quantise(weight, 32, torch.bfloat16, None)
        assert torch.equal(quantised.scale, in_bf16.scale.to(dtype)) and torch.equal(quantised.values, in_bf16.values)
        layer = nn.Linear(256, 96, dtype=dtype)
        layer.weight = nn.Parameter(target.tensor(quantised, dtype), requires_grad=False)
        expected = numbers.compute(inputs, quantised, layer.bias)
        torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(quantised.scale, plain.numbers().quantise(weight, 32, dtype, None).scale) == (
        dtype == torch.bfloat16
    )


@pytest.mark.parametrize("columns", [1024, 4096])
def test_integer_sums_are_exact(columns: int) -> None:
    left, right = (torch.randint(-128, 128, (rows, columns), dtype=torch.int8) for rows in (5, 24))
    left[0], right[0] = -128, -128  # the largest sum there is
    exact = (left.long() @ right.long().t()).float()
    assert torch.equal(integers.integer_product(left, right), exact)


# ---------------------------------------------------------------------- float32 weights, scales that ship in bf16


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_integers_are_nearest_to_the_float32_weight_under_the_scale_that_ships(bits: int, group_size: int) -> None:
    low, high = integers.symmetric_range(bits)
    for seed in range(3):
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * 0.05
        quantised = integers.quantise_symmetric(weight, group_size, torch.bfloat16, bits=bits)
        assert quantised.scale.dtype == torch.bfloat16
        scale = quantised.scale.double().repeat_interleave(group_size, dim=1)
        candidates = torch.arange(low, high + 1, dtype=torch.float64)
        errors = (weight.double().unsqueeze(-1) - candidates * scale.unsqueeze(-1)).abs()
        chosen = (weight.double() - quantised.values.double() * scale).abs()
        # 1/scale in float32 decides; a tie within its rounding may go either way
        assert (chosen <= errors.amin(-1) + 1e-5 * scale).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_tinygemm_takes_the_integer_nearest_to_a_float32_weight(group_size: int) -> None:
    for seed in range(3):
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * 0.05
        quantised = integers.quantise_tinygemm(weight, group_size, torch.bfloat16)
        assert quantised.zero is not None
        assert quantised.scale.dtype == quantised.zero.dtype == torch.bfloat16
        scale, zero = (part.double().repeat_interleave(group_size, dim=1) for part in (quantised.scale, quantised.zero))
        candidates = torch.arange(16, dtype=torch.float64)
        errors = (weight.double().unsqueeze(-1) - ((candidates - 8) * scale.unsqueeze(-1) + zero.unsqueeze(-1))).abs()
        chosen = (weight.double() - ((quantised.values.double() - 8) * scale + zero)).abs()
        assert (chosen <= errors.amin(-1) + 1e-5 * scale).all()


# ---------------------------------------------------------------------- formats of GPUs, against torchao's functions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_fp8_equals_torchao_to_the_bit(dtype: torch.dtype, seed: int) -> None:
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.common import KernelPreference

    weight = hard_weight(seed, dtype=dtype)
    theirs = Float8Tensor.from_hp(weight, kernel_preference=KernelPreference.TORCH)
    ours = float8.FP8.quantise(weight, None, dtype, None)
    assert torch.equal(ours.scale, theirs.scale)
    empty = (weight == 0).all(-1) | (ours.scale.flatten() == 0)  # torchao divides 0 by 0 there; ours keeps it zero
    assert same_bits(ours.values[~empty], theirs.qdata[~empty])
    assert torch.equal(float8.FP8.restore(ours, dtype)[~empty], theirs.dequantize()[~empty])
    assert not float8.FP8.restore(ours, dtype)[empty].any()
    tensor = find_target("fp8", "cuda-sm89").tensor(ours, dtype)
    assert torch.equal(tensor.dequantize(), float8.FP8.restore(ours, dtype))
    assert tensor.block_size == theirs.block_size and tensor.dtype == dtype
    assert tensor.kernel_preference == tensor.act_quant_kwargs.kernel_preference == KernelPreference.TORCH


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_fp8_tokens_equal_those_of_the_layer_to_the_bit(dtype: torch.dtype, seed: int) -> None:
    from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor

    tokens, target = hard_weight(seed, dtype=dtype), find_target("fp8", "cuda-sm89")
    weight = float8.FP8.quantise(torch.randn(32, 256).to(dtype), None, dtype, None)
    theirs = _choose_quant_func_and_quantize_tensor(tokens, target.tensor(weight, dtype).act_quant_kwargs)
    encode, activation = float8.FP8.encode, float8.FP8.activation
    assert encode is not None and activation is not None
    ours = encode(tokens)
    assert torch.equal(ours.scale, theirs.scale) and same_bits(ours.values, theirs.qdata)
    assert torch.equal(activation(tokens), theirs.dequantize())
    assert (ours.scale > 0).all() and not activation(tokens)[[0, 4]].any()  # those of zeros stay zeros


def test_an_fp8_layer_gives_zeros_for_a_token_of_zeros() -> None:
    """As that of padding is where its embedding is zero: as NaN it would reach its neighbours through attention."""
    weight = float8.FP8.quantise(torch.randn(32, 64).bfloat16(), None, torch.bfloat16, None)
    layer = nn.Linear(64, 32, bias=False)
    layer.weight = nn.Parameter(find_target("fp8", "cuda-sm89").tensor(weight, torch.bfloat16), requires_grad=False)
    inputs = torch.randn(4, 64).bfloat16()
    inputs[1] = 0
    output = layer(inputs)
    assert not output[1].any() and output[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("seed", range(4))
def test_tinygemm_integers_and_scales_equal_torchao(group_size: int, seed: int) -> None:
    from torchao.quantization.quant_primitives import (
        MappingType,
        _choose_qparams_affine_tinygemm,
        _quantize_affine_tinygemm,
    )

    weight = hard_weight(seed, dtype=torch.bfloat16)
    block = (1, group_size)
    scale, zero = _choose_qparams_affine_tinygemm(weight, MappingType.ASYMMETRIC, block, torch.int32, 0, 15)
    codes = _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, quant_min=0, quant_max=15)
    ours = integers.quantise_tinygemm(weight, group_size, torch.bfloat16)
    assert ours.zero is not None
    scale, zero = scale.reshape(ours.scale.shape), zero.reshape(ours.zero.shape)
    assert torch.equal(ours.scale, scale) and torch.equal(ours.zero, zero)
    assert torch.equal(ours.values.to(torch.int32), codes)
    grouped = codes.reshape(96, -1, group_size).float()
    expected = ((grouped - 8) * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).to(torch.bfloat16)
    assert torch.equal(integers.TINYGEMM.round_trip(weight, group_size), expected.reshape(96, 256))


# ---------------------------------------------------------------------- mslk's formats, against their formulas


def _unpacked(tensor: Tensor) -> Tensor:
    """Signed integers (O, I) of an Int4Tensor's bytes: the even column in the low half."""
    low, high = tensor << 4 >> 4, tensor >> 4
    return torch.stack([low, high], dim=-1).reshape(tensor.shape[0], -1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group_size", [32, 128])
def test_int4_of_mslk_is_its_formula_and_unpacks_to_itself(group_size: int, seed: int) -> None:
    weight = hard_weight(seed, dtype=torch.bfloat16)
    ours = integers.INT4_MSLK.quantise(weight, group_size, torch.bfloat16, None)
    assert ours.zero is not None
    rows = weight.reshape(-1, group_size).float()  # mslk's int4_row_quantize_zp, line by line
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    zero = low + scale * 8
    codes = rows.sub(low).div(scale).round().clamp(0, 15).sub(8).to(torch.int8).reshape(96, 256)
    scale, zero = (part.reshape(96, -1).to(torch.bfloat16) for part in (scale, zero))
    assert torch.equal(ours.values.to(torch.int8) - 8, codes)
    assert torch.equal(ours.scale, scale) and torch.equal(ours.zero, zero)
    wide = (part.float().repeat_interleave(group_size, dim=1) for part in (scale, zero))
    expected = (codes.float() * next(wide) + next(wide)).to(torch.bfloat16)
    assert torch.equal(integers.INT4_MSLK.restore(ours, torch.bfloat16), expected)
    tensor = find_target("int4", "cuda-sm90-mslk").tensor(ours, torch.bfloat16)
    assert torch.equal(_unpacked(tensor.qdata), codes)
    assert torch.equal(tensor.scale.t(), scale) and torch.equal(tensor.zero_point.t(), zero)
    assert tensor.shape == weight.shape and list(tensor.block_size) == [1, group_size]
    assert tensor.activation_dtype == torch.bfloat16 and tensor.qdata.is_contiguous() and tensor.scale.is_contiguous()


@pytest.mark.parametrize("seed", range(3))
def test_fp8_of_mslk_is_its_formula(seed: int) -> None:
    weight = hard_weight(seed, dtype=torch.bfloat16)
    ours = float8.FP8_MSLK.quantise(weight, None, torch.bfloat16, None)
    largest = weight.float().abs().amax(-1, keepdim=True).clamp(min=1 / 512)
    assert torch.equal(ours.scale, largest / 448)
    expected = (weight.float() / (largest / 448)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert same_bits(ours.values, expected)
    inputs = hard_weight(seed + 1, (15, 256), torch.bfloat16).reshape(3, 5, 256)
    activation = float8.FP8_MSLK.activation
    assert activation is not None
    rounded = activation(inputs).double()
    exact = rounded @ (ours.values.double() * ours.scale.double()).t()
    real = float8.FP8_MSLK.compute(inputs, ours, None).double()
    ordinary = (slice(2, 3), slice(None), slice(10, None))  # rows that do not overflow
    assert (real - exact)[ordinary].norm() <= 0.004 * exact[ordinary].norm()


@pytest.mark.parametrize("seed", range(3))
def test_fp8_int4_is_its_formula_and_unpacks_to_itself(seed: int) -> None:
    weight = hard_weight(seed, dtype=torch.bfloat16)
    ours = float8.FP8_INT4.quantise(weight, 128, torch.bfloat16, None)
    rows = weight.reshape(-1, 128).float()  # mslk's int4_row_quantize, line by line
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-6) / 8
    codes = (rows / scale).round().clamp(-8, 7).to(torch.int8).reshape(96, 256)
    scale = scale.reshape(96, -1).to(torch.bfloat16)
    assert torch.equal(ours.values.to(torch.int8), codes) and torch.equal(ours.scale, scale)
    operand = (codes.bfloat16() * scale.repeat_interleave(128, dim=1)).float().clamp(-448, 448)
    assert torch.equal(float8.FP8_INT4.restore(ours, torch.float32), operand.to(torch.float8_e4m3fn).float())
    tensor = find_target("fp8-int4", "cuda-sm90-mslk").tensor(ours, torch.bfloat16)
    assert torch.equal(_unpacked(tensor.qdata), codes)
    assert torch.equal(tensor.scale.t(), scale) and not tensor.zero_point.any()
    assert tensor.activation_dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("scheme", "target_name"), EVERY_TARGET)
def test_a_bias_is_added_and_leading_dimensions_are_kept(scheme: str, target_name: str) -> None:
    numbers = find_target(scheme, target_name).numbers()
    weight, bias = torch.randn(48, 128) * 0.05, torch.randn(48)
    quantised = numbers.quantise(weight, group_sizes(scheme, target_name)[0], torch.float32, None)
    inputs = torch.randn(2, 3, 128)
    with_bias, without = numbers.compute(inputs, quantised, bias), numbers.compute(inputs, quantised, None)
    torch.testing.assert_close(with_bias, without + bias, rtol=1e-5, atol=1e-5)
    if numbers is not microscaling.NVFP4:  # whose inputs share a scale, however many they are
        rows = torch.stack([numbers.compute(row, quantised, None) for row in inputs.reshape(6, 128)])
        torch.testing.assert_close(rows.reshape(2, 3, 48), without, rtol=1e-5, atol=1e-5)
    plain = nn.functional.linear(inputs, weight)
    bound = {2: 0.7, 3: 0.35, 4: 0.2, 5: 0.1, 6: 0.05, 7: 0.05, 8: 0.05}[int(SCHEMES[scheme].bits)]
    assert (without - plain).norm() < bound * plain.norm()
