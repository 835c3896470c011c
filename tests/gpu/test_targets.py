"""On a GPU: the real quantised layers hold and compute the numbers of their target's round trip.

`pytest -m gpu tests/gpu`
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantize.hardware import pick_target
from quantize.schemes import SCHEMES, Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _quantised(weight: Tensor, target: Target, group_size: int | None) -> nn.Linear:
    from torchao.quantization import quantize_

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="cuda")
    linear.weight.data = weight.clone()
    quantize_(linear, target.config(group_size))
    return linear


def _weight(seed: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 10.0 ** (seed % 5 - 3)).to("cuda", dtype)


def _target(scheme: str) -> Target:
    target, missing = pick_target(SCHEMES[scheme], None)
    if missing:
        pytest.skip("; ".join(missing))
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("seed", range(3))
def test_int8_int4_equals_the_real_layer_to_the_bit(dtype: torch.dtype, group_size: int, seed: int) -> None:
    target = _target("int8-int4")
    weight = _weight(seed, (96, 512), dtype)
    linear = _quantised(weight, target, group_size)
    rounded = target.weight(weight, group_size)
    assert torch.equal(linear.weight.dequantize(), rounded)
    assert target.activation is not None
    inputs = _weight(seed + 1, (40, 512), dtype)
    assert torch.equal(linear(inputs), nn.functional.linear(target.activation(inputs), rounded))


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(96, 512), (576, 576 // 64 * 64), (512, 1536), (2048, 6144)])
@pytest.mark.parametrize("seed", range(3))
def test_int4_kernel_reads_the_round_trip_to_the_bit(group_size: int, shape: tuple[int, int], seed: int) -> None:
    """The kernel hands out its weight when it multiplies the identity: each output is one weight, rounded once."""
    if shape[1] % group_size:
        pytest.skip("the group size does not divide in_features")
    target = _target("int4")
    weight = _weight(seed, shape, torch.bfloat16)
    linear = _quantised(weight, target, group_size)
    columns = torch.eye(shape[1], dtype=torch.bfloat16, device="cuda")
    stored = torch.cat([linear(rows) for rows in columns.split(64)]).t()
    assert torch.equal(stored, target.weight(weight, group_size))


@pytest.mark.parametrize("seed", range(3))
def test_fp8_holds_the_round_trip_to_the_bit(seed: int) -> None:
    target = _target("fp8")
    weight = _weight(seed, (2048, 512), torch.bfloat16)
    linear: Any = _quantised(weight, target, None)
    assert torch.equal(linear.weight.dequantize(), target.weight(weight, None))


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
@pytest.mark.parametrize("rows", [1, 40, 512])
def test_outputs_differ_by_the_kernel_s_accumulation_alone(scheme: str, rows: int) -> None:
    """Relative to the exact product of the rounded operands, the real layer errs as one rounding to bf16 does."""
    target = _target(scheme)
    group_size = SCHEMES[scheme].group_size
    weight, inputs = _weight(2, (2048, 2048), torch.bfloat16), _weight(3, (rows, 2048), torch.bfloat16)
    linear = _quantised(weight, target, group_size)
    rounded = inputs if target.activation is None else target.activation(inputs)
    exact = rounded.double() @ target.weight(weight, group_size).double().t()
    bf16_product = nn.functional.linear(rounded, target.weight(weight, group_size)).double()
    real = linear(inputs).double()
    error, floor = (real - exact).norm() / exact.norm(), (bf16_product - exact).norm() / exact.norm()
    print(f"{scheme} {rows} rows: real {error:.2e}, bf16 product {floor:.2e}")
    assert error < 0.01
