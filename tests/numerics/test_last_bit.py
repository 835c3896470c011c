"""The floor of a comparison: what a last bit of the embeddings makes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from quantize.last_bit import last_bits_changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_off_by_a_last_bit_while_it_is_held(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    embedding, ids = model.get_input_embeddings(), torch.arange(1, 65).reshape(2, 32)  # 0 is padding, a row of zeros
    plain = embedding(ids)
    with last_bits_changed(model):
        first, second = embedding(ids), embedding(ids)
    with last_bits_changed(model):
        again = embedding(ids)
    assert torch.equal(embedding(ids), plain)
    assert torch.equal(again, first) and not torch.equal(first, second)  # the same noise, not one for every call
    relative = ((first.float() - plain.float()).abs() / plain.float().abs()).mean() / torch.finfo(dtype).eps
    assert 0.5 < relative < 1.2 and first.dtype == dtype  # |a normal variable| is 0.8 on average
