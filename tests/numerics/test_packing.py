"""Packed rows give each sample the loss that it has alone: no attention, position or label crosses a border."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from train.collators import IGNORED, Collator, PackedCollator, pack, with_labels

LENGTHS = (9, 30, 4, 17, 22, 12, 40, 3)


def _model() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)  # strong enough that a wrong neighbour shows
    return model.eval()


@pytest.fixture(scope="module")
def rows() -> Any:
    """Samples of several lengths; the second learns every token, the first one too, as plain text does."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(0, 64, (length,), generator=generator).tolist()
        mask = [1] * length if number == 1 else [0] * (length // 2) + [1] * (length - length // 2)
        samples.append({"input_ids": ids, "loss_mask": mask, "row": number + 1})
    return with_labels(Dataset.from_list(samples))


def _summed_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of nats over the learned tokens."""
    batch = {name: value for name, value in batch.items() if name != "rows"}
    learned = int((batch["labels"][:, 1:] != IGNORED).sum())
    return model(**batch).loss * learned


def test_samples_stay_whole_and_none_is_lost(rows: Any) -> None:
    packed = pack(rows, 48)
    assert len(packed) < len(rows)
    assert all(len(row["input_ids"]) <= 48 for row in packed)
    found = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            assert len(set(row["row"][start : start + length])) == 1
            found.append(tuple(row["input_ids"][start : start + length]))
            assert row["labels"][start] == IGNORED
            start += length
    assert sorted(found) == sorted(tuple(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradient_are_those_of_the_samples_alone(rows: Any, attention: str) -> None:
    model = _model()
    model.set_attn_implementation(attention)
    packed = PackedCollator(name_lengths=False)(list(pack(rows, 48)))
    assert packed["rows"].tolist() == list(range(1, len(LENGTHS) + 1))
    _summed_loss(model, packed).backward()
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    loss = _summed_loss(model, packed).item()
    model.zero_grad()
    alone = [_summed_loss(model, Collator(0)([row])) for row in rows]
    torch.stack(alone).sum().backward()
    # transformers computes the loss of float64 logits in float32, hence not closer.
    assert loss == pytest.approx(sum(one.item() for one in alone), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_last_token_of_a_sample_does_not_learn_the_next_one(rows: Any) -> None:
    batch = PackedCollator(name_lengths=True)(list(pack(rows, 48)))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), batch["packed_seq_lengths"].long().cumsum(0)[:-1]])
    assert (batch["labels"][0, starts] == IGNORED).all()
    assert (batch["position_ids"][0, starts] == 0).all()
    assert int(batch["packed_seq_lengths"].sum()) == batch["input_ids"].shape[1]
