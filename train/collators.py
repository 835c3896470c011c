"""Prepared rows -> batches, padded or packed. Shapes: `B` rows a batch, `T` tokens, `S` samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


def with_labels(dataset: Any) -> Any:
    """Puts `labels` in the place of `loss_mask`: the token where it is learned, else -100."""

    def label(example: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(example["input_ids"], example["loss_mask"], strict=True)
        return {"labels": [token if learned else IGNORED for token, learned in pairs]}

    return dataset.map(label, remove_columns=["loss_mask"])


def pack(dataset: Any, max_length: int) -> Any:
    """Fills rows of at most `max_length` tokens with whole samples (TRL's best fit decreasing).

    Args:
        dataset: columns input_ids, labels, row.

    Returns:
        A dataset with columns input_ids, labels, row (of each token) and seq_lengths (of each sample).
    """
    from trl import pack_dataset

    def prepare(example: dict[str, Any]) -> dict[str, Any]:
        # A sample's first token has nothing of its own before it: the sample before must not learn to predict it.
        return {
            "labels": [IGNORED, *example["labels"][1:]],
            "row": [example["row"]] * len(example["input_ids"]),
        }

    columns = ["input_ids", "labels", "row"]
    return pack_dataset(dataset.select_columns(columns).map(prepare), max_length, "bfd")


class Collator:
    """Pads a batch on the right: input_ids, attention_mask, labels (B, T), and the data rows (B,) for messages."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Examples with input_ids, labels, row -> a batch."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        ones = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(ones, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "rows": torch.tensor([example["row"] for example in examples]),
        }


class PairCollator:
    """Pads pairs of answers on the right: the better ones of a batch, then the worse ones.

    input_ids, attention_mask and completion_mask (2 B, T), and the data rows (B,) for messages.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Examples with input_ids, loss_mask, rejected_ids, rejected_mask, row -> a batch."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.tensor(example[name]) for name in ("input_ids", "rejected_ids") for example in examples]
        masks = [torch.tensor(example[name]) for name in ("loss_mask", "rejected_mask") for example in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "completion_mask": pad_sequence(masks, batch_first=True),
            "rows": torch.tensor([example["row"] for example in examples]),
        }


class PackedCollator:
    """Lays a batch of packed rows end to end, as one row without padding: input_ids, labels, position_ids (1, T).

    Positions start again at each sample; that is what keeps samples apart in transformers' attention masks.

    Args:
        name_lengths: adds packed_seq_lengths (S,), from which unsloth's own kernels know the samples.
    """

    def __init__(self, *, name_lengths: bool) -> None:
        self.name_lengths = name_lengths

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Examples as `pack` makes them -> a batch."""
        import torch

        lengths = [length for example in examples for length in example["seq_lengths"]]
        batch = {
            "input_ids": _one_row(examples, "input_ids"),
            "labels": _one_row(examples, "labels"),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
            "use_cache": False,  # with a cache, transformers takes the row for one sample
            "rows": _one_row(examples, "row").unique(),
        }
        if self.name_lengths:
            batch["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        return batch


def _one_row(examples: Sequence[dict[str, Any]], name: str) -> Any:
    import torch

    return torch.tensor([value for example in examples for value in example[name]]).unsqueeze(0)
