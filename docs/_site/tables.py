"""The reference tables, from the definitions that the commands themselves read: schema, parsers and formats."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic_core import PydanticUndefined

from quantize.algorithms import ALGORITHMS
from quantize.cli import _parser
from quantize.commands import VERBS
from quantize.commands.schemes import _LEGEND
from quantize.schemes import SCHEMES, Scheme, Target
from train.cli import _DESCRIPTION
from train.config import RunConfig
from train.config_messages import expected_at
from train.config_values import section_of
from train.help import HelpLine


def configuration() -> str:
    """Every key of the schema: one table for the keys outside of sections, one for each section."""
    alone = [name for name, field in RunConfig.model_fields.items() if section_of(field.annotation) is None]
    parts = ["## Outside of sections", _keys(RunConfig, alone, ())]
    for name, field in RunConfig.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            continue
        said = field.description or section.__doc__ or ""
        parts += [f"## {name}", said, _keys(section, section.model_fields, (name,))]
    return "\n\n".join(parts)


def _keys(section: Any, names: Iterable[str], above: tuple[str, ...]) -> str:
    rows = []
    for name in names:
        field, key = section.model_fields[name], ".".join((*above, name))
        rows.append((_code(name, key), _words(expected_at((*above, name))), _default(field), field.description or ""))
    return _table(("key", "takes", "default", "what"), rows)


def _default(field: Any) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    return _code(json.dumps(value) if not isinstance(value, str) else value)


def _words(text: str) -> str:
    """A list of choices may break after each."""
    return text.replace("one of ", "")


def train_command() -> str:
    """`train`'s own options, and how it is used."""
    own = [name for name in HelpLine.model_fields if name not in RunConfig.model_fields]
    rows = []
    for name in own:
        field = HelpLine.model_fields[name]
        value = "" if field.annotation is bool else f" {'FILE' if name == 'config' else 'RUN'}"
        rows.append((_code(f"--{name.replace('_', '-')}{value}"), field.description or ""))
    usage, _, said = _DESCRIPTION.partition("\n\nEvery key")
    commands = "\n".join(line.strip() for line in usage.splitlines() if line.startswith("  "))
    said = re.sub(r"(--[\w.]+=\w+)", lambda found: _code(found[1]), " ".join(f"Every key{said}".split()))
    return "\n\n".join((f"```bash\n{commands}\n```", said, _table(("option", "what"), rows)))


def quantize_command() -> str:
    """The verbs of `quantize`, each with its usage line and options."""
    subparsers = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    parts = []
    for name, verb in VERBS.items():
        parser = subparsers.choices[name]
        summary = verb.SUMMARY[0].upper() + verb.SUMMARY[1:]
        rows = [(_code(_shown(action)), _help(action)) for action in parser._actions if action.dest != "help"]
        parts += [f"### quantize {name}", f"{summary}.", _usage(parser), _table(("option", "what"), rows)]
    return "\n\n".join(parts)


def _usage(parser: argparse.ArgumentParser) -> str:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "84"  # argparse takes the terminal's width, and a page has none
    try:
        return f"```text\n{parser.format_usage().removeprefix('usage: ').rstrip()}\n```"
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def _shown(action: argparse.Action) -> str:
    """The option with what it takes: `--skip NAME ...`."""
    value = action.metavar or ("" if action.choices else action.dest.upper())
    value = "|".join(map(str, action.choices)) if action.choices and not action.metavar else str(value)
    if action.nargs == 0:
        return action.option_strings[0]
    more = " ..." if action.nargs in ("+", "*") else ""
    return " ".join((*action.option_strings[:1], value + more))


def _help(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%")


def formats() -> str:
    """An overview, and each format with its targets."""
    rows = []
    for scheme in SCHEMES.values():
        first = next(iter(scheme.targets.values()))
        sizes = ", ".join(map(str, scheme.group_sizes))
        several = f" (of {sizes})" if len(scheme.group_sizes) > 1 else ""
        groups = f"{scheme.group_size}{several}" if sizes else "a row's"
        link = f"[`{scheme.name}`](#{scheme.name})"
        rows.append((link, scheme.summary, f"{scheme.bits:g}", groups, f"{scheme.bits_on_disk(first):g}"))
    parts = [_table(("format", "what", "bits", "weights a scale", "bits on disk"), rows), _legend()]
    for scheme in SCHEMES.values():
        parts += [f"## {scheme.name}", f"{scheme.summary[0].upper()}{scheme.summary[1:]}.", *_format(scheme)]
    return "\n\n".join(parts)


def _legend() -> str:
    """The sentence of `quantize schemes` about the column that this table has too."""
    said = next(sentence for sentence in _LEGEND.split(". ") if sentence.startswith("on disk"))
    return f"{said[0].upper()}{said[1:]}.".replace("--packed", _code("quantize convert --packed"))


def _format(scheme: Scheme) -> Iterator[str]:
    rows = [
        (
            _code(target.name),
            _needs(target),
            _fidelity(target),
            _speed(target),
            f"no, {target.vllm}" if target.vllm else f"yes; speed: {target.served or 'not measured'}",
        )
        for target in scheme.targets.values()
    ]
    yield _table(("target", "needs", "real layer against training's", "speed in torch", "vLLM"), rows)
    if scheme.embedding is not None:
        yield f"The untied input embedding is quantised too, in {scheme.embedding_bits:g} bits."
    if scheme.skip:
        yield f"Kept in 16 bit: {', '.join(_code(name) for name in scheme.skip)}."
    for layout, reason in scheme.left_out.items():
        yield f"Not offered: {layout}: {reason}."


def _needs(target: Target) -> str:
    parts = [need.replace("cuda>=", "CUDA >= ").replace("mslk", "mslk-cuda") for need in target.needs] or [
        "any machine"
    ]
    if target.by_request:
        parts.append("by request: `--quantize.target`")
    if target.group_sizes:
        parts.append(f"groups of {', '.join(map(str, target.group_sizes))}")
    return "; ".join(parts)


def _fidelity(target: Target) -> str:
    if not target.max_output_error:
        return "equal to the last bit"
    return f"outputs within {target.max_output_error:g}, loss within {target.max_gap_nats:g} nats a token"


def _speed(target: Target) -> str:
    return "; ".join(filter(None, (str(target.speed or "not measured"), target.note)))


def algorithms() -> str:
    """What chooses numbers without QAT, in the order in which the kinds work."""
    kinds = {"rotates": "rotation", "scales": "scales", "rounds": "rounding"}
    rows = [
        (
            _code(each.name),
            word,
            each.summary,
            "yes" if each.calibrated else "no",
            "no" if each.integers_only else "yes",
        )
        for kind, word in kinds.items()
        for each in ALGORITHMS.values()
        if each.kind == kind
    ]
    return _table(("algorithm", "kind", "what", "needs text", "for float formats too"), rows)


def _code(text: str, anchor: str = "") -> str:
    mark = "``" if "`" in text else "`"
    return f"{mark}{text}{mark}" + (f"{{ #{anchor} }}" if anchor else "")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in lines
    )
