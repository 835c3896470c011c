"""Held-out samples for a checkpoint that no run has made: from a file of text, or a run's own tokenised ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from quantize.errors import UserError
from quantize.evaluate import Sample, read_samples

_LONGEST = 512
"""Tokens of a sample; a longer text gives several."""


def load_samples(path: Path, tokenizer: Any, count: int, option: str = "--data") -> list[Sample]:
    """The first `count` samples of a file.

    Args:
        path: .parquet with input_ids and loss_mask, as a run's data/eval.parquet; .jsonl with a column text, messages,
            or prompt and completion; or .txt. The last two of .jsonl are put into the tokenizer's chat template, where
            it has one, and only the last answer is scored; of a text every token is.
        option: what named the file, for errors.

    Raises:
        UserError: the file cannot be read as any of these, or holds no sample.
    """
    if not path.is_file():
        raise UserError(f"{option} {path}: there is no such file")
    try:
        if path.suffix == ".parquet":
            samples = [sample for sample in read_samples(path) if any(sample.loss_mask[1:])][:count]
        else:
            samples = _first(_tokenised(path, tokenizer), count)
    except (ValueError, KeyError, TypeError, OSError, TemplateError) as error:
        raise UserError(f"{option} {path}: {error}") from error
    if not samples:
        raise UserError(f"{option} {path}: it holds no sample of two tokens or more")
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
        return _chat(row["messages"], tokenizer)
    if "prompt" in row and "completion" in row:
        if getattr(tokenizer, "chat_template", None) is None:
            return tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"], add_special_tokens=False)
        turns = zip(("user", "assistant"), (row["prompt"], row["completion"]), strict=True)
        return _chat([{"role": role, "content": content} for role, content in turns], tokenizer)
    raise ValueError(f"row {number} has neither text, messages, nor prompt and completion, but {', '.join(row)}")


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """What comes before the last answer, and that answer with its end of turn; all is scored where none can be told."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("messages need a chat template, and this tokenizer has none")
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    before = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    if messages[-1]["role"] != "assistant" or not whole.startswith(before):
        before = ""
    parts = before, whole[len(before) :]
    given, scored = (tokenizer.encode(part, add_special_tokens=False) if part else [] for part in parts)
    return given, scored


def _pieces(given: list[int], scored: list[int]) -> Iterator[Sample]:
    """Pieces of `_LONGEST` tokens; a prompt that is longer keeps its end."""
    given = given[-_LONGEST // 2 :]
    room = _LONGEST - len(given)
    for start in range(0, len(scored), room):
        piece = scored[start : start + room]
        mask = [0] * len(given) + [1] * len(piece)
        if any(mask[1:]):  # the first token is predicted from nothing
            yield Sample([*given, *piece], mask)
