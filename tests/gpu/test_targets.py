"""On a GPU: torchao's own layers hold the integers and scales of `quantize.numerics`, and compute what it computes.

`pytest -m gpu -s tests/gpu` prints a line with the measured error of each layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import EVERY_TARGET, assert_same_parts, find_target, group_sizes, torchao_layer
from torch import Tensor, nn

from quantize.hardware import missing_for
from quantize.schemes import SCHEMES, Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = ((96, 512), (192, 576), (512, 1536), (272, 2048))  # out_features, in_features
ON_CUDA = [
    *((name, target) for name, target in EVERY_TARGET if SCHEMES[name].targets[target].needs),
    ("int8-int4-mobile", "embedding"),
]


CASES = [(*case, size) for case in ON_CUDA for size in group_sizes(*case) if size is None or size <= 128]


def _runnable(scheme: str, target_name: str) -> Target:
    target = find_target(scheme, target_name)
    if missing := missing_for(target):
        pytest.skip("; ".join(missing))
    return target


def _dtypes(scheme: str, target: Target) -> list[torch.dtype]:
    if scheme.startswith("mxfp"):
        return [torch.bfloat16]  # what torchao's config takes; tests/numerics/test_microscaling.py has float32
    return [torch.float32, torch.bfloat16] if target.dtype is None else [getattr(torch, target.dtype)]


def _shapes(target: Target, group_size: int | None) -> list[tuple[int, int]]:
    return [shape for shape in SHAPES if group_size is None or shape[1] % group_size == 0]


def _normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * size).to("cuda", dtype)


def _weight(seed: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Normal weights, from very small to large with the seed; one row is constant, one positive, one zero."""
    weight = _normal(seed, shape, dtype, 10.0 ** (seed % 5 - 3))
    weight[1], weight[2], weight[3] = weight[1, 0], weight[2].abs(), 0
    return weight


@pytest.mark.parametrize(("scheme", "target_name", "group_size"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_torchao_stores_our_numbers_to_the_bit(
    scheme: str, target_name: str, group_size: int | None, seed: int
) -> None:
    target = _runnable(scheme, target_name)
    for dtype in _dtypes(scheme, target):
        for shape in _shapes(target, group_size):
            weight = _weight(seed, shape, dtype)
            if scheme == "fp8":
                weight[3] = weight[2]  # torchao divides 0 by 0 in a row of zeros; ours keeps it zero
            theirs = torchao_layer(weight, target, group_size).weight.data
            ours = target.tensor(target.numbers().quantise(weight, group_size, dtype, None), dtype)
            if type(theirs).__name__ == "Int4TilePackedTo4dTensor":
                _assert_same_tiles(ours, theirs, shape)
            else:
                assert_same_parts(ours, theirs)
            print(f"\n{scheme}/{target_name} group {group_size} {shape} {dtype} seed {seed}: stored to the bit")


def _assert_same_tiles(ours: Any, theirs: Any, shape: tuple[int, int]) -> None:
    """What of tinygemm's layout is not padding, which is multiplied by zeros: the identity's test reads the rest."""
    assert type(ours) is type(theirs)
    assert list(ours.block_size) == list(theirs.block_size) and ours.shape == theirs.shape
    groups = shape[1] // ours.block_size[1]
    kept = [tensor.scale_and_zero[:groups, : shape[0]] for tensor in (ours, theirs)]
    assert torch.equal(*kept)
    assert ours.scale_and_zero.shape == theirs.scale_and_zero.shape
    assert ours.qdata.shape == theirs.qdata.shape and ours.qdata.dtype == theirs.qdata.dtype
    if shape[1] % 1024 == 0 and shape[0] % 8 == 0:
        assert torch.equal(ours.qdata, theirs.qdata)


@pytest.mark.parametrize(("scheme", "target_name", "group_size"), [case for case in CASES if case[1] != "embedding"])
@pytest.mark.parametrize("rows", [1, 40, 512])
def test_layers_compute_what_the_simulation_computes(
    scheme: str, target_name: str, group_size: int | None, rows: int
) -> None:
    target = _runnable(scheme, target_name)
    numbers = target.numbers()
    for dtype in _dtypes(scheme, target):
        for shape in _shapes(target, group_size):
            for seed, with_bias in ((1, False), (2, True)):
                weight, inputs = _normal(seed, shape, dtype, 0.05), _normal(seed + 10, (rows, shape[1]), dtype)
                bias = _normal(seed + 20, (shape[0],), dtype) if with_bias else None
                layer = torchao_layer(weight, target, group_size, bias)
                quantised = numbers.quantise(weight, group_size, dtype, None)
                real, simulated = layer(inputs), numbers.compute(inputs, quantised, bias)
                error = ((real.double() - simulated.double()).norm() / real.double().norm()).item()
                what = f"{scheme}/{target_name} group {group_size} {shape} {dtype} {rows} rows bias {with_bias}"
                print(f"\n{what}: relative error {error:.2e}, bound {target.max_output_error}")
                assert real.dtype == simulated.dtype and real.shape == simulated.shape
                if target.max_output_error == 0:
                    assert torch.equal(real, simulated), what
                else:
                    assert error <= target.max_output_error, what


@pytest.mark.parametrize(("scheme", "target_name", "group_size"), [case for case in CASES if case[1] != "embedding"])
def test_a_grid_that_a_float32_sum_chose_ships_as_it_is(scheme: str, target_name: str, group_size: int | None) -> None:
    """As training ships it: integers from W + s B A in float32, scales in bf16, and the layer reads exactly those."""
    target = _runnable(scheme, target_name)
    numbers = target.numbers()
    for shape in _shapes(target, group_size):
        weight, inputs = _normal(5, shape, torch.float32, 0.05), _normal(6, (40, shape[1]), torch.bfloat16)
        quantised = numbers.quantise(weight, group_size, torch.bfloat16, None)
        layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device="cuda")
        layer.weight = nn.Parameter(target.tensor(quantised, torch.bfloat16), requires_grad=False)
        real, simulated = layer(inputs), numbers.compute(inputs, quantised, None)
        error = ((real.double() - simulated.double()).norm() / real.double().norm()).item()
        print(f"\n{scheme}/{target_name} group {group_size} {shape} float32 sum: relative error {error:.2e}")
        assert error <= target.max_output_error


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(96, 512), (576, 576), (512, 1536), (2048, 6144)])
@pytest.mark.parametrize("seed", range(3))
def test_tinygemm_reads_the_round_trip_to_the_bit(group_size: int, shape: tuple[int, int], seed: int) -> None:
    """The kernel hands out its weight when it multiplies the identity: each output is one weight, rounded once."""
    if shape[1] % group_size:
        pytest.skip("the group size does not divide in_features")
    target = _runnable("int4", "cuda-sm80")
    numbers = target.numbers()
    weight = _weight(seed, shape, torch.bfloat16)
    ours = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device="cuda")
    quantised = numbers.quantise(weight, group_size, torch.bfloat16, None)
    ours.weight = nn.Parameter(target.tensor(quantised, torch.bfloat16), requires_grad=False)
    columns = torch.eye(shape[1], dtype=torch.bfloat16, device="cuda")
    for layer in (ours, torchao_layer(weight, target, group_size)):
        stored = torch.cat([layer(rows) for rows in columns.split(64)]).t()
        assert torch.equal(stored, numbers.round_trip(weight, group_size))


@pytest.mark.parametrize(("scheme", "target_name", "group_size"), [case for case in CASES if case[1] != "embedding"])
@pytest.mark.parametrize("rows", [1, 40])
def test_training_computes_what_the_shipped_layer_computes(
    scheme: str, target_name: str, group_size: int | None, rows: int
) -> None:
    """The QAT layer under bf16 autocast, float32 weights and an adapter, against torchao's layer of its grid."""
    from collections import Counter

    from qat.layer import LayerNumerics, Projection
    from qat.linear import fake_quant_linear

    target = _runnable(scheme, target_name)
    shape = _shapes(target, group_size)[0]
    numerics = LayerNumerics(
        name="layer", numbers=target.numbers(), group_size=group_size, dtype=torch.bfloat16, scaling=2.0,
        calls=Counter(),
    )  # fmt: skip
    weight, lora_a = _normal(1, shape, torch.float32, 0.05), _normal(2, (4, shape[1]), torch.float32, 0.05)
    lora_b = _normal(3, (shape[0], 4), torch.float32, 0.05)
    inputs = _normal(4, (rows, shape[1]), torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        trained = fake_quant_linear(inputs, Projection(weight, lora_a, lora_b, None, None), numerics)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device="cuda")
    grid = numerics.quantise(weight, lora_a, lora_b)
    layer.weight = nn.Parameter(target.tensor(grid, torch.bfloat16), requires_grad=False)
    real = layer(inputs)
    error = ((real.double() - trained.double()).norm() / real.double().norm()).item()
    print(f"\n{scheme}/{target_name} group {group_size} {rows} rows trained against shipped: {error:.2e}")
    assert error <= target.max_output_error
