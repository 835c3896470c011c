"""Rows of the common data formats -> chat messages, plain text, or a pair of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.errors import UserError

Message = dict[str, str]

# format -> columns that must be there
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
}
_PAIRS = "preference"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers to it, as chat messages; the last message of each answer is the assistant's."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def find_format(columns: Sequence[str], wanted: str, source: str, method: str = "sft") -> str:
    """The format to read, found by the columns where `wanted` is "auto".

    Args:
        method: `train.method`: dpo reads pairs of answers, the others all else.

    Raises:
        UserError: the columns fit no format, or not the one that was named.
    """
    if method == "dpo":
        wanted = _PAIRS
    if wanted != "auto":
        lacking = [name for name in COLUMNS[wanted] if name not in columns]
        if lacking:
            asked = f"train.method={method}" if method == "dpo" else f"data.format={wanted}"
            needed_too = " and prompt" if wanted == _PAIRS and "prompt" not in columns else ""
            raise UserError(
                f"{source}: {asked} needs the columns {', '.join(COLUMNS[wanted])}{needed_too}; row 1 lacks "
                f"{', '.join(lacking)} (it has {', '.join(columns)})"
            )
        return wanted
    offered = {name: needed for name, needed in COLUMNS.items() if name != _PAIRS}
    if method == "grpo":
        del offered["text"]
    for name, needed in offered.items():
        if all(column in columns for column in needed):
            return name
    if all(column in columns for column in COLUMNS[_PAIRS]):
        raise UserError(f"{source} holds pairs of answers (chosen, rejected): they are learned with train.method=dpo")
    if method == "grpo" and "prompt" in columns:
        raise UserError(
            f"{source}: train.method=grpo needs a reference answer beside each prompt, for the rewards and the "
            f"held-out loss: a column completion; found {', '.join(columns)}"
        )
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in offered.items())
    raise UserError(f"{source}: the columns {', '.join(columns)} fit no known format ({known}); rename them")


def to_messages(row: Mapping[str, Any], form: str, number: int, source: str) -> list[Message] | str:
    """One row as chat messages, or as text. `number` counts from 1, for messages to the user."""
    try:
        return _READERS[form](row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _misfit(form, number, source, error) from error


def to_preference(row: Mapping[str, Any], number: int, source: str) -> Preference:
    """One row with `chosen` and `rejected` as a pair of answers to one prompt.

    The answers are text or messages beside a column `prompt`, or whole conversations, whose common beginning is the
    prompt then.
    """
    try:
        return _preference(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _misfit(_PAIRS, number, source, error) from error


def _misfit(form: str, number: int, source: str, error: Exception) -> UserError:
    needed = ", ".join(COLUMNS[form])
    reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
    return UserError(f"{source}, row {number}: not in the format {form} (columns {needed}): {reason}")


def _preference(row: Mapping[str, Any]) -> Preference:
    chosen, rejected = (_answer(row[name]) for name in ("chosen", "rejected"))
    if all(answer[0]["role"] == "assistant" for answer in (chosen, rejected)):
        prompt = row["prompt"]
        before = _messages(prompt, "role", "content") if isinstance(prompt, list) else [
            {"role": "user", "content": _text(prompt)}
        ]  # fmt: skip
    else:
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        if same == min(len(chosen), len(rejected)):  # equal, or one the beginning of the other
            same = max(index for index in range(same) if chosen[index]["role"] == "assistant")
        before, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if not before:
        raise ValueError("the answers have no prompt in common")
    if any(answer[0]["role"] != "assistant" for answer in (chosen, rejected)):
        raise ValueError("the conversations part before an answer, not in it")
    return Preference(before, chosen, rejected)


def _answer(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = _turns(value, "role", "content")
    if messages[-1]["role"] != "assistant":
        raise ValueError("an answer must end with an assistant turn")
    return messages


def _turns(turns: Sequence[Mapping[str, Any]], role: str, content: str) -> list[Message]:
    messages = _messages(turns, role, content)
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no assistant turn")
    return messages


def _messages(turns: Sequence[Mapping[str, Any]], role: str, content: str) -> list[Message]:
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError("no turns")
    messages = []
    for turn in turns:
        if turn[role] not in _ROLES:
            raise ValueError(f"unknown role {turn[role]!r}")
        messages.append({"role": _ROLES[turn[role]], "content": _text(turn[content])})
    return messages


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"text expected, found {type(value).__name__}")
    return value


def _pair(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        return _turns([*prompt, *completion], "role", "content")
    return _asked(prompt, completion)


def _asked(question: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": _text(question)}, {"role": "assistant", "content": _text(answer)}]


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    question = _text(row["instruction"]) + (f"\n\n{row['input']}" if row.get("input") else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row["output"])}]


_READERS: dict[str, Callable[[Mapping[str, Any]], list[Message] | str]] = {
    "messages": lambda row: _turns(row["messages"], "role", "content"),
    "sharegpt": lambda row: _turns(row["conversations"], "from", "value"),
    "prompt_completion": _pair,
    "alpaca": _alpaca,
    "question_answer": lambda row: _asked(row["question"], row["answer"]),
    "text": lambda row: _text(row["text"]),
}
