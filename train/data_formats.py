"""Rows of the common data formats -> chat messages, or plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantize.errors import UserError

Message = dict[str, str]

# format -> columns that must be there
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def find_format(columns: Sequence[str], wanted: str, source: str) -> str:
    """The format to read, found by the columns where `wanted` is "auto".

    Raises:
        UserError: the columns fit no format, or not the one that was named.
    """
    if wanted != "auto":
        lacking = [name for name in COLUMNS[wanted] if name not in columns]
        if lacking:
            raise UserError(
                f"{source}: data.format={wanted} needs the columns {', '.join(COLUMNS[wanted])}; row 1 lacks "
                f"{', '.join(lacking)} (it has {', '.join(columns)})"
            )
        return wanted
    for name, needed in COLUMNS.items():
        if all(column in columns for column in needed):
            return name
    offered = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items())
    raise UserError(f"{source}: the columns {', '.join(columns)} fit no known format ({offered}); rename them")


def to_messages(row: Mapping[str, Any], form: str, number: int, source: str) -> list[Message] | str:
    """One row as chat messages, or as text. `number` counts from 1, for messages to the user."""
    try:
        return _READERS[form](row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        needed = ", ".join(COLUMNS[form])
        raise UserError(f"{source}, row {number}: not in the format {form} (columns {needed}): {error}") from error


def _turns(turns: Sequence[Mapping[str, Any]], role: str, content: str) -> list[Message]:
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError("no turns")
    messages = []
    for turn in turns:
        if turn[role] not in _ROLES:
            raise ValueError(f"unknown role {turn[role]!r}")
        messages.append({"role": _ROLES[turn[role]], "content": _text(turn[content])})
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no assistant turn")
    return messages


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"text expected, found {type(value).__name__}")
    return value


def _pair(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        return _turns([*prompt, *completion], "role", "content")
    return [{"role": "user", "content": _text(prompt)}, {"role": "assistant", "content": _text(completion)}]


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    question = _text(row["instruction"]) + (f"\n\n{row['input']}" if row.get("input") else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row["output"])}]


_READERS: dict[str, Callable[[Mapping[str, Any]], list[Message] | str]] = {
    "messages": lambda row: _turns(row["messages"], "role", "content"),
    "sharegpt": lambda row: _turns(row["conversations"], "from", "value"),
    "prompt_completion": _pair,
    "alpaca": _alpaca,
    "text": lambda row: _text(row["text"]),
}
