"""Held-out samples for a checkpoint that no run has made: from a file of text, or a run's own tokenised ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.evaluate import Sample, read_samples

_LONGEST = 512
"""Tokens of a sample; a longer text gives several."""


def load_samples(path: Path, tokenizer: Any, count: int) -> list[Sample]:
    """The first `count` samples of a file.

    Args:
        path: .parquet with input_ids and loss_mask, as a run's data/eval.parquet; .jsonl with a column text, messages,
            or prompt and completion; or .txt. What is scored: the answer of prompt and completion, else every token.

    Raises:
        UserError: the file cannot be read as any of these, or holds no sample.
    """
    if not path.is_file():
        raise UserError(f"--data {path}: there is no such file")
    try:
        if path.suffix == ".parquet":
            samples = read_samples(path)[:count]
        else:
            samples = _first(_tokenised(path, tokenizer), count)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"--data {path}: {error}") from error
    if not samples:
        raise UserError(f"--data {path}: it holds no sample of two tokens or more")
    return samples


def _first(samples: Iterator[Sample], count: int) -> list[Sample]:
    return [sample for sample, _ in zip(samples, range(count), strict=False)]


def _tokenised(path: Path, tokenizer: Any) -> Iterator[Sample]:
    if path.suffix == ".txt":
        yield from _pieces([], tokenizer.encode(path.read_text(encoding="utf-8")))
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _pieces(*_row(json.loads(line), number, tokenizer))
    else:
        raise ValueError("give a .txt, .jsonl or .parquet file")


def _row(row: Mapping[str, Any], number: int, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of what is given, and of what is scored."""
    if "text" in row:
        return [], tokenizer.encode(row["text"])
    if "messages" in row:
        return [], tokenizer.encode(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    if "prompt" in row and "completion" in row:
        return tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"], add_special_tokens=False)
    raise ValueError(f"row {number} has neither text, messages, nor prompt and completion, but {', '.join(row)}")


def _pieces(given: list[int], scored: list[int]) -> Iterator[Sample]:
    """Pieces of `_LONGEST` tokens; a prompt that is longer keeps its end."""
    given = given[-_LONGEST // 2 :]
    room = _LONGEST - len(given)
    for start in range(0, len(scored), room):
        piece = scored[start : start + room]
        mask = [0] * len(given) + [1] * len(piece)
        if any(mask[1:]):  # the first token is predicted from nothing
            yield Sample([*given, *piece], mask)
