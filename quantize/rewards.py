"""Rewards of GRPO: the packaged ones, and Python functions of the user's own, found by their import path.

A reward is what TRL calls a reward function: `function(prompts, completions, completion_ids, **columns)` returns a
number, or None for no opinion, for each completion. Prompts and completions are lists of chat messages; `columns` holds
`answer`, the reference answer of each row, and the row's other columns. Give it `**kwargs` for what it does not read.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

Reward = Callable[..., Sequence[float | None]]
Chat = Sequence[dict[str, str]]
_NUMBER = re.compile(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?")


def exact_match(completions: Sequence[Chat], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1 where the completion is the reference answer, but for white space at its ends."""
    return [float(_text(found).strip() == wanted.strip()) for found, wanted in zip(completions, answer, strict=True)]


def contains_answer(completions: Sequence[Chat], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1 where the reference answer stands somewhere in the completion."""
    pairs = zip(completions, answer, strict=True)
    return [float(bool(wanted.strip()) and wanted.strip() in _text(found)) for found, wanted in pairs]


def same_number(completions: Sequence[Chat], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1 where the last number of the completion equals that of the reference answer."""
    pairs = zip(completions, answer, strict=True)
    found = [(_last_number(_text(completion)), _last_number(wanted)) for completion, wanted in pairs]
    return [float(number is not None and number == wanted) for number, wanted in found]


PACKAGED: dict[str, Reward] = {
    "exact_match": exact_match,
    "contains_answer": contains_answer,
    "same_number": same_number,
}


def load_rewards(names: Sequence[str]) -> list[Reward]:
    """The functions of `grpo.rewards`.

    Raises:
        UserError: one line for each that cannot be imported or called.
    """
    found: list[Reward] = []
    lines: list[str] = []
    for name in names:
        try:
            found.append(PACKAGED.get(name) or _import(name))
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*lines)
    return found


def source_key(name: str) -> str:
    """What changes when a reward of one's own does: the content of the file that is named; empty for a packaged one.

    What that file imports is not looked at.
    """
    if name in PACKAGED:
        return ""
    _import(name)
    where = name.rpartition(":")[0]
    file = Path(where).expanduser() if where.endswith(".py") else getattr(sys.modules[where], "__file__", None)
    try:
        return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()[:16]
    except OSError:
        return ""  # a module without a file


def rate(
    names: Sequence[str],
    weights: Sequence[float] | None,
    prompts: Sequence[Chat],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, list[Any]],
) -> list[float]:
    """The weighted sum of the rewards of each completion, as TRL adds them; no opinion (None, NaN) counts 0.

    Args:
        weights: of each reward; None = 1 each.
        columns: answer (the reference answers) and the rows' other columns, a list each.
    """
    total = [0.0] * len(completions)
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        (reward,) = load_rewards([name])
        try:
            given = list(
                reward(
                    prompts=list(prompts),
                    completions=chats,
                    completion_ids=[list(ids) for ids in completion_ids],
                    trainer_state=None,
                    log_metric=_unheard,
                    log_extra=_unheard,
                    **columns,
                )
            )
            numbers = [0.0 if value is None or value != value else float(value) for value in given]
        except Exception as error:  # the user's own code may raise anything
            raise UserError(f"grpo.rewards: {name} failed: {type(error).__name__}: {error}") from error
        if len(given) != len(total):
            raise UserError(f"grpo.rewards: {name} gave {len(given)} numbers for {len(total)} completions")
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"grpo.rewards: {name} gave an infinite number")
        total = [before + weight * value for before, value in zip(total, numbers, strict=True)]
    return total


def _unheard(*args: Any, **kwargs: Any) -> None:
    """What a reward logs in training is not logged in an evaluation."""


def _import(name: str) -> Reward:
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute.isidentifier():
        raise UserError(
            f"grpo.rewards: {name} is neither packaged ({', '.join(PACKAGED)}) nor package.module:function or "
            "path/to/file.py:function"
        )
    try:
        module = _from_file(Path(where).expanduser()) if where.endswith(".py") else _from_path(where)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code may raise anything, or end the program
        raise UserError(f"grpo.rewards: {where} cannot be imported: {type(error).__name__}: {error}") from error
    reward = getattr(module, attribute, None)
    if not callable(reward):
        raise UserError(f"grpo.rewards: {where} has no function {attribute}")
    if inspect.iscoroutinefunction(reward):
        raise UserError(f"grpo.rewards: {name} is a coroutine (async def); give a plain function")
    return reward  # type: ignore[no-any-return]


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"grpo.rewards: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"ongrid_rewards_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of the file look it up there
    spec.loader.exec_module(module)
    return module


def _from_path(name: str) -> Any:
    with _here_first():
        return importlib.import_module(name)


@contextmanager
def _here_first() -> Iterator[None]:
    """The current folder among those that are imported from, as `python -m` has it and an installed command has not."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _text(completion: Chat) -> str:
    return "".join(message["content"] for message in completion)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
