"""The round trips in quantize/numerics.py are torchao's real tensors, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantize.numerics import fp8_per_row, int4_tinygemm, int8_asymmetric_per_token, int_symmetric_per_group
from quantize.schemes import SCHEMES

DTYPES = (torch.float32, torch.bfloat16)


def _weight(seed: int, dtype: torch.dtype) -> Tensor:
    """(96, 256) with the rows that break formulas: zero, constant, one-sided, negative zero, huge and tiny."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(96, 256, generator=generator) * 10.0 ** (seed - 2)
    weight[0], weight[1], weight[2], weight[3] = 0, 3.5, -weight[2].abs(), -0.0
    weight[4] *= 1e30
    weight[5] *= 1e-30
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_int8_int4_equals_torchao_to_the_bit(dtype: torch.dtype, group_size: int, seed: int) -> None:
    from torchao.quantization import quantize_

    weight = _weight(seed, dtype)
    linear = nn.Linear(256, 96, bias=False, dtype=dtype)
    linear.weight.data = weight.clone()
    target = SCHEMES["int8-int4"].targets["cpu"]
    quantize_(linear, target.config(group_size))
    assert torch.equal(linear.weight.dequantize(), target.weight(weight, group_size))
    inputs = _weight(seed + 1, dtype)[:15].reshape(3, 5, 256)
    expected = nn.functional.linear(int8_asymmetric_per_token(inputs), int_symmetric_per_group(weight, group_size, 4))
    # huge weights times huge inputs overflow alike on both sides
    torch.testing.assert_close(linear(inputs), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_int8_embedding_equals_torchao_to_the_bit(dtype: torch.dtype, seed: int) -> None:
    from torchao.quantization import quantize_

    scheme = SCHEMES["int8-int4-mobile"]
    assert scheme.embedding is not None
    embedding = nn.Embedding(96, 256, dtype=dtype)
    embedding.weight.data = _weight(seed, dtype)
    expected = scheme.embedding_weight(embedding.weight.data.clone(), None)
    quantize_(embedding, scheme.embedding(), filter_fn=lambda module, name: True)
    assert torch.equal(embedding.weight.dequantize(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_fp8_equals_torchao_to_the_bit(dtype: torch.dtype, seed: int) -> None:
    from torchao.quantization.quantize_.workflows import Float8Tensor

    weight = _weight(seed, dtype)
    # torchao divides 0 by 0 in a row of zeros; ours keeps it zero.
    assert torch.equal(torch.nan_to_num(Float8Tensor.from_hp(weight).dequantize()), fp8_per_row(weight))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_tinygemm_integers_and_scales_equal_torchao(group_size: int, seed: int) -> None:
    from torchao.quantization.quant_primitives import (
        MappingType,
        _choose_qparams_affine_tinygemm,
        _quantize_affine_tinygemm,
    )

    weight = _weight(seed, torch.bfloat16)
    block = (1, group_size)
    scale, zero = _choose_qparams_affine_tinygemm(weight, MappingType.ASYMMETRIC, block, torch.int32, 0, 15)
    integers = _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, quant_min=0, quant_max=15)
    grouped = integers.reshape(96, -1, group_size).float()
    expected = ((grouped - 8) * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).to(torch.bfloat16)
    assert torch.equal(int4_tinygemm(weight, group_size), expected.reshape(96, 256))
