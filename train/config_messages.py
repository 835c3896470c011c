"""What is said about a wrong value: where it was given, what was expected, and what was probably meant."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from train.config import RunConfig
from train.config_values import annotation_at, keys_of, kinds_of, section_of

_ELSEWHERE = {
    "alpha": "lora.lora_alpha", "batch_size": "train.per_device_train_batch_size", "data.dataset": "data.train",
    "data.name": "data.train", "data.path": "data.train", "dataset": "data.train", "epochs": "train.num_train_epochs",
    "lr": "train.learning_rate", "model.model": "model.id", "model.name": "model.id", "model.path": "model.id",
    "model_name": "model.id", "name": "run.name", "output": "run.root", "rank": "lora.r", "steps": "train.max_steps",
    "train.epochs": "train.num_train_epochs", "train.lr": "train.learning_rate", "train.steps": "train.max_steps",
}  # fmt: skip
"""What other tools call a key -> its name here."""
_COMPARISONS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


class Origins:
    """Where each value came from, for messages."""

    def __init__(self, file: str, known: Mapping[tuple[str, ...], str]) -> None:
        self.file, self.known = file, known

    def option(self, path: Sequence[str]) -> str | None:
        """The option that set this key, a section above it or a key below it, as typed."""
        place = self.place(path)
        return place if place.startswith("--") else None

    def place(self, path: Sequence[str]) -> str:
        """The file and line, or the option."""
        path = tuple(path)
        if path in self.known:
            return self.known[path]
        for key, place in self.known.items():
            if key[: len(path)] == path and place.startswith("--"):  # --model.shape.hidden_size sets model.shape
                return place
        above = (path[:length] for length in range(len(path) - 1, 0, -1))
        return next((self.known[key] for key in above if key in self.known), self.file)


def describe_error(path: tuple[str, ...], kind: str, values: Any, origins: Origins) -> str:
    """The line for one error of pydantic: `kind` is its type ("missing", "extra_forbidden", ...)."""
    name, option = ".".join(path), origins.option(path)
    if kind == "extra_forbidden":
        if option:
            typed = option.split()[0].partition("=")[0]
            near = did_you_mean(typed.removeprefix("--").replace("-", "_"))
            return f"unknown option {typed}" + (f"; did you mean --{near}?" if near else "; see --help")
        near = did_you_mean(name)
        return f"unknown key `{name}` in {origins.place(path)}" + (
            f"; did you mean `{near}`?" if near else "; see --help"
        )
    expected = expected_at(path)
    if kind == "missing":
        return f"`{name}` is missing in {origins.file}; expected {expected}; or give --{name}=..."
    value = values
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    near_value = _near_choice(path, value)
    hint = f"; did you mean {near_value}?" if near_value else ""
    if option:
        return f"{option}: expected {expected}{hint}"
    return f"`{name}` in {origins.place(path)} is {shown(value)}; expected {expected}{hint}"


def did_you_mean(name: str) -> str | None:
    """The known key that `name` is most likely meant to be."""
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    keys = list(keys_of(RunConfig))
    leaf = name.rpartition(".")[2]
    same_leaf = [key for key in keys if key.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(name, same_leaf or keys, n=1, cutoff=0.0 if same_leaf else 0.65)
    if not near:
        by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys)}
        near = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.8)]
    return next(iter(near), None)


def expected_at(path: Sequence[str]) -> str:
    """What a key takes, in words: "a whole number >= 1, or null"."""
    if not path:
        return "sections with keys"
    section = section_of(annotation_at(RunConfig, path[:-1]))
    field = section.model_fields[path[-1]] if section is not None else FieldInfo(annotation=Any)
    words = [word for kind in kinds_of(field.annotation) if (word := _word(kind))]
    if {"a whole number", "a number"} <= set(words):
        words.remove("a whole number")
    bounds = [
        f"{sign} {bound}"
        for item in field.metadata
        for name, sign in _COMPARISONS
        if (bound := getattr(item, name, None)) is not None
    ]
    text = " or ".join(words) + (" " + " and ".join(bounds) if bounds else "")
    return f"{text}, or null" if type(None) in kinds_of(field.annotation) else text


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a section with keys"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): ""}
    if get_origin(kind) is list:
        (element,) = get_args(kind)
        return f"a list of {'whole numbers above 0' if int in (element, *get_args(element)) else 'texts'}"
    return names.get(kind, "keys with values")


def _near_choice(path: Sequence[str], value: Any) -> str | None:
    choices = [
        str(c)
        for kind in kinds_of(annotation_at(RunConfig, path))
        if get_origin(kind) is Literal
        for c in get_args(kind)
    ]
    near = difflib.get_close_matches(str(value), choices, n=1)
    return near[0] if near else None


def shown(value: Any) -> str:
    """A value as it is written, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
