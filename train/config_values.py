"""From text to values: YAML as people mean it, and the command line's `--section.key=value`.

YAML 1.1 reads `1e-3` as text, `off` as false and `010` as 8. Here the rules of YAML 1.2 hold (true, false and null are
the only words), and Python's True, False and None, which W&B agents write, are read too.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

Path_ = tuple[str, ...]
NULLS = frozenset({"None", "none", "null", "Null", "NULL", "~"})
_BOOLEANS = {"true": True, "false": False}


class PlainLoader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2 and without repeated keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute, filled by add_implicit_resolver)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict; a repeated key or a key that is no text is an error that names its line."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key `{key.value}` is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return {str(key): value for key, value in super().construct_mapping(node, deep=deep).items()}


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0) if re.match(r"[-+]?0[xo]", text) else int(text)


PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0o[0-7]+|0x[0-9a-fA-F]+|[0-9][0-9_]*)$"), list("-+0123456789")
)
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$"),
    list("-+.0123456789"),
)
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|None|)$"), ["~", "n", "N", ""]
)
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
PlainLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass(frozen=True)
class Override:
    """One option of the command line."""

    option: str
    """As typed, for messages: "--train.max-steps=8"."""
    path: Path_
    """Where it goes: ("train", "max_steps")."""
    value: Any


def annotation_at(model: type[BaseModel], path: Sequence[str]) -> Any:
    """The annotation of a dotted key; Any inside a dict field. Raises KeyError where there is no such key."""
    annotation: Any = model
    for key in path:
        section = section_of(annotation)
        if section is not None:
            annotation = section.model_fields[key].annotation
        elif dict in {get_origin(kind) or kind for kind in kinds_of(annotation)} or annotation is Any:
            annotation = Any
        else:
            raise KeyError(key)
    return annotation


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation (also `Section | None`) holds."""
    for kind in kinds_of(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def keys_of(model: type[BaseModel], prefix: Path_ = ()) -> Iterator[str]:
    """Every dotted key of a config, sections included."""
    for name, field in model.model_fields.items():
        yield ".".join((*prefix, name))
        section = section_of(field.annotation)
        if section is not None:
            yield from keys_of(section, (*prefix, name))


def parse_options(model: type[BaseModel], arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Reads `--section.key=value` and `--section.key value`; dashes and underscores are alike.

    Returns:
        The overrides in the order given (unknown keys included: who merges them reports them), and the errors.
    """
    overrides, errors = [], []
    tokens = list(arguments)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or len(token) < 3:
            errors.append(f"unexpected argument {token!r}; options are written --section.key=value")
            continue
        name, equals, text = token[2:].partition("=")
        path = tuple(name.replace("-", "_").split("."))
        try:
            annotation = annotation_at(model, path)
        except KeyError:
            annotation = Any
        if equals:
            overrides.append(Override(token, path, read_value(text, annotation)))
            continue
        values = _following(tokens, many=_takes_list(annotation))
        if not values and annotation is not bool:
            errors.append(f"{token} needs a value: {token}=...")
            continue
        option = " ".join((token, *values))
        value = True if not values else read_value(values[0], annotation)
        overrides.append(Override(option, path, value if len(values) < 2 else _items(values, annotation)))
    return overrides, errors


def _following(tokens: list[str], *, many: bool) -> list[str]:
    values: list[str] = []
    while tokens and not tokens[0].startswith("--") and (many or not values):
        values.append(tokens.pop(0))
    return values


def _takes_list(annotation: Any) -> bool:
    return any(get_origin(kind) is list for kind in kinds_of(annotation))


def read_value(text: str, annotation: Any) -> Any:
    """The value that `text` means for a field of this annotation; pydantic refuses what fits none."""
    kinds = kinds_of(annotation)
    if types.NoneType in kinds and text in NULLS:
        return None
    if any(get_origin(kind) is Literal for kind in kinds):
        return _unquoted(text)
    if bool in kinds:
        return _BOOLEANS.get(text.lower(), text)
    value = _as_yaml(text)
    if isinstance(value, list) and _takes_list(annotation):
        return _items(value, annotation)
    if _takes_list(annotation) and ("," in text or str not in kinds):
        return _items([_unquoted(part.strip()) for part in text.split(",") if part.strip()], annotation)
    if str in kinds:
        return _unquoted(text)
    section = section_of(annotation)
    if section is not None and isinstance(value, dict):  # W&B's nested parameters: --train={'max_steps': 8.0}
        fields = section.model_fields
        return {key: _whole(each, fields[key].annotation) if key in fields else each for key, each in value.items()}
    return _whole(value, annotation)


def _whole(value: Any, annotation: Any) -> Any:
    """8.0, which W&B's quantised distributions give, as 8 where a whole number is wanted."""
    kinds = kinds_of(annotation)
    wanted = int in kinds and float not in kinds and isinstance(value, float) and value.is_integer()
    return int(value) if wanted else value


def _items(values: Sequence[Any], annotation: Any) -> list[Any]:
    """The elements of a list as its annotation wants them; what is no number is left for pydantic to refuse."""
    wanted: Any = next(get_args(kind)[0] for kind in kinds_of(annotation) if get_origin(kind) is list)
    if get_origin(wanted) is Annotated:
        wanted = get_args(wanted)[0]
    if wanted is int:
        return [int(item) if str(item).strip().lstrip("+-").isdigit() else item for item in values]
    return [str(item) for item in values]


def _as_yaml(text: str) -> Any:
    try:
        return yaml.load(text, PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError):
        return text


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
