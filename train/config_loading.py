"""Finds, reads, merges and validates a config; everything that is wrong with it is reported at once."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from quantize.errors import UserError
from train.config import RunConfig
from train.config_checks import find_problems
from train.config_messages import Origins, describe_error, shown
from train.config_values import Override, PlainLoader, annotation_at, kinds_of, parse_options, section_of
from train.inputs import missing_inputs

HOME = Path(__file__).resolve().parent.parent
"""The folder that holds the packages, `configs/` and `examples/`, in a clone as in an installed wheel."""
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def find_config(name: str) -> Path:
    """The file of a config: `name` as a path, else a packaged config, with or without ".yaml".

    Raises:
        UserError: there is none; lists the packaged ones.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = {file.name: file for file in sorted((HOME / "configs").glob("*.yaml"))}
    for candidate in (name, f"{name}.yaml"):
        if candidate in packaged:
            return packaged[candidate]
    if path.is_dir():
        resolved = path / "config.resolved.json"
        hint = (
            f"to repeat it: --config {resolved}; to continue it: --resume {name}"
            if resolved.is_file()
            else "give a file"
        )
        raise UserError(f"--config {name} is a folder; {hint}")
    near = difflib.get_close_matches(path.name, packaged, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--config {name}: no such file; {hint}packaged configs: {', '.join(packaged) or 'none'}")


def load_config(path_or_name: str | Path, overrides: Sequence[str] = (), *, with_inputs: bool = False) -> RunConfig:
    """Reads a YAML file or a config.resolved.json, and puts the command line's options over it.

    Args:
        path_or_name: as in `find_config`.
        overrides: options as typed, as ["--qat", "int8-int4", "--train.max-steps=8"].
        with_inputs: where settings are wrong, say too what is wrong with the model and the data.

    Raises:
        UserError: one line for each thing that is wrong, with the file and line or the option as typed.
    """
    file = find_config(str(path_or_name))
    values, origins = read_file(file)
    options, errors = parse_options(RunConfig, overrides)
    for option in options:
        error = _put(values, option)
        if error:
            errors.append(error)
        else:
            origins[option.path] = option.option
    for name, field in RunConfig.model_fields.items():
        if section_of(field.annotation) and values.get(name) is None and type(None) not in kinds_of(field.annotation):
            values[name] = {}  # a section without a key under it
    given = {option.path for option in options}
    config = _validated(values, Origins(str(file), origins), errors, with_inputs)
    if config.model.random == "tiny" and not given & {("data",), ("data", "train")} and _is_packaged(file):
        config = _without_hub(config)
    return config


def read_file(
    file: Path, expected: str = "sections such as `model:` and `data:`"
) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The mapping in a YAML or JSON file, and where each of its keys stands ("sft.yaml:12").

    Args:
        expected: what it should hold, for the message where it holds something else.

    Raises:
        UserError: unreadable, malformed, a key given twice, or no mapping.
    """
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_unique) if file.suffix == ".json" else yaml.load(text, PlainLoader)
        tree = None if file.suffix == ".json" else yaml.compose(text, PlainLoader)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text, so no YAML") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: malformed YAML: {error.problem or error.context}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: malformed JSON: {error.msg}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds {shown(values)}"
        raise UserError(f"{file}: {what}; expected {expected}")
    return values, dict(_lines(tree, file, ())) if tree is not None else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key `{next(name for name in names if names.count(name) > 1)}` is given twice")
    return values


def _lines(node: yaml.Node, file: Path, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, f"{file}:{key.start_mark.line + 1}"
            yield from _lines(value, file, path)


def _put(values: dict[str, Any], option: Override) -> str | None:
    """Merges one option into the values; says why where it cannot."""
    for depth, key in enumerate(option.path[:-1]):
        below = values.get(key)
        if below is None:
            below = values[key] = {}
        if not isinstance(below, dict):
            return f"{option.option}: `{'.'.join(option.path[: depth + 1])}` has no keys"
        values = below
    last = option.path[-1]
    old, is_section = values.get(last), False
    with contextlib.suppress(KeyError):  # an unknown key is reported once everything is merged
        is_section = section_of(annotation_at(RunConfig, option.path)) is not None
    merges = is_section and isinstance(old, dict) and isinstance(option.value, dict)
    values[last] = {**old, **option.value} if merges and old else option.value
    return None


def _validated(values: dict[str, Any], origins: Origins, errors: list[str], with_inputs: bool) -> RunConfig:
    """Validates, and where single values are wrong validates the rest too, so that every error is seen at once."""
    lines, bad = list(errors), set[tuple[str, ...]]()
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        for path, kind in _distinct(error):
            bad.add(path)
            lines.append(describe_error(path, kind, values, origins))
        config = _without(values, bad)
    sections = {path[0] for path in bad}
    for problem in find_problems(config):
        if not any(_overlap(tuple(key.split(".")), path) for key in problem.keys for path in bad):
            places = dict.fromkeys(origins.place(key.split(".")) for key in problem.keys)
            given = [place for place in places if place != origins.file] or [origins.file]
            lines.append(f"{problem.text} ({', '.join(given)})")
            sections |= {key.partition(".")[0] for key in problem.keys}
    config = with_packaged_data(config)
    if lines:
        raise UserError(*lines, *(missing_inputs(config, sections) if with_inputs else ()))
    return config


def _distinct(error: ValidationError) -> list[tuple[tuple[str, ...], str]]:
    """(key, error type), one per key: pydantic gives one error for each member of a union."""
    found: dict[tuple[str, ...], str] = {}
    for item in error.errors(include_url=False):
        path: tuple[str, ...] = ()
        for part in item["loc"]:
            try:
                annotation_at(RunConfig, (*path, str(part)))
            except KeyError:
                if item["type"] == "extra_forbidden":
                    path = (*path, str(part))
                break  # an index, or the name of a union's member
            path = (*path, str(part))
        found.setdefault(path, item["type"])
    return list(found.items())


def _without(values: dict[str, Any], bad: set[tuple[str, ...]]) -> RunConfig:
    """A config of the values that are right, with stand-ins for what must be given."""
    values = json.loads(json.dumps(values, default=str))
    for *above, last in sorted(bad, key=len, reverse=True):
        section: Any = values
        for key in above:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    for section_name, key in (("model", "id"), ("data", "train")):
        section = values.setdefault(section_name, {})
        section.setdefault(key, "unknown")
    return RunConfig.model_validate(values)


def _overlap(key: tuple[str, ...], path: tuple[str, ...]) -> bool:
    shared = min(len(key), len(path))
    return key[:shared] == path[:shared]


def _is_packaged(file: Path) -> bool:
    return file.resolve().parent == HOME / "configs"


def _without_hub(config: RunConfig) -> RunConfig:
    """`--model.random=tiny` tries a packaged config offline, so data that lies on the hub gives way to the examples."""
    if Path(config.data.train).is_file():
        return config
    examples = {key: str(HOME / "examples" / "data" / f"reasoning_{key}.jsonl") for key in ("train", "eval")}
    return config.model_copy(update={"data": config.data.model_copy(update=examples)})


def with_packaged_data(config: RunConfig) -> RunConfig:
    """Packaged configs name packaged data (`examples/data/...`): found beside the packages from any working folder."""
    found = {}
    for key in ("train", "eval"):
        name = getattr(config.data, key)
        if name and name.endswith(_DATA_SUFFIXES) and not Path(name).exists() and (HOME / name).is_file():
            found[key] = str(HOME / name)
    return config.model_copy(update={"data": config.data.model_copy(update=found)}) if found else config
