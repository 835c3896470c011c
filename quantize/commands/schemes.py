"""`quantize schemes`: the formats, where they run, and what is missing here."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator

from quantize.schemes import SCHEMES, Scheme, Target, find_scheme

SUMMARY = "print the formats: bits, groups, where they run, how fast, what is missing here"

_HEADER = ("scheme", "bits", "group", "on disk", "QAT", "real layer", "runs here as")
_LEGEND = (
    "on disk: bits a weight in the checkpoint that transformers loads, with scales; --packed stores 2 to 7 as such. "
    "QAT: training simulates the numbers that ship. real layer: its output against training's; 'equal' is to the last "
    "bit, else the largest relative error that is let through. runs here as: targets in brackets are taken by request "
    "(--target NAME, --quantize.target=NAME); 'simulated' numbers are those of the hardware that is missing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The formats to print."""
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help="print these alone (all)")


def run(options: argparse.Namespace) -> None:
    """Prints them, as wide as the terminal is; elsewhere a line stays whole, so that it can be searched."""
    from quantize.hardware import missing_for

    chosen = [find_scheme(name) for name in options.schemes] or list(SCHEMES.values())
    missing = {
        (scheme.name, target.name): missing_for(target) for scheme in chosen for target in scheme.targets.values()
    }
    width = min(shutil.get_terminal_size().columns, 120) if sys.stdout.isatty() else sys.maxsize
    for line in (*_table(chosen, missing, width), *_lacking(missing, width), *_details(chosen, missing, width)):
        print(line)


Missing = dict[tuple[str, str], list[str]]


def _table(schemes: list[Scheme], missing: Missing, width: int) -> Iterator[str]:
    rows = [_HEADER, *(_row(scheme, missing) for scheme in schemes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    for row in rows:
        *cells, last = row
        start = "  ".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True)) + "  "
        yield from _wrapped(last, width, start, " " * len(start))
    yield ""
    yield from _wrapped(_LEGEND, width)


def _row(scheme: Scheme, missing: Missing) -> tuple[str, ...]:
    first = next(iter(scheme.targets.values()))
    runs = [target for name, target in scheme.targets.items() if not missing[scheme.name, name]]
    here = [target.name for target in runs if not target.by_request] or ["simulated"]
    asked = [target.name for target in runs if target.by_request]
    return (
        scheme.name,
        f"{scheme.bits:g}",
        str(scheme.group_size or "row"),
        f"{scheme.bits_on_disk(first):g}",
        "yes",  # of every entry: its numbers are the fake quantiser
        f"{first.max_output_error:g}" if first.max_output_error else "equal",
        ", ".join(here) + (f" ({', '.join(asked)})" if asked else ""),
    )


def _details(schemes: list[Scheme], missing: Missing, width: int) -> Iterator[str]:
    for scheme in schemes:
        yield ""
        yield from _wrapped(f"{scheme.name}: {scheme.summary}", width, after="  ")
        sizes = ", ".join(map(str, scheme.group_sizes))
        yield f"  {scheme.bits:g} bits; " + (f"group size {scheme.group_size} (of {sizes})" if sizes else "per row")
        for target in scheme.targets.values():
            yield from _wrapped(
                f"{target.name}: {_state(missing[scheme.name, target.name], target)}", width, "  ", "    "
            )
            yield from _wrapped(f"speed: {target.speed or 'not measured'}", width, "    ", "      ")
            yield from _wrapped(f"vLLM: {_vllm(target)}", width, "    ", "      ")
            if target.note:
                yield from _wrapped(f"note: {target.note}", width, "    ", "      ")
        for layout, reason in scheme.left_out.items():
            yield from _wrapped(f"not offered: {layout}: {reason}", width, "  ", "    ")


def _vllm(target: Target) -> str:
    if target.vllm:
        return f"no, {target.vllm}"
    how = "with options that quantize serve gives" if target.vllm_arguments else "quantize serve"
    return f"loads it as it is ({how}); speed there: {target.served or 'not measured'}"


def _state(lacking: list[str], target: Target) -> str:
    """Whether it runs, how it is taken, and how far its layer may be from training."""
    parts = [f"needs {', '.join(target.needs)}, missing here" if lacking else "runs here"]
    if target.by_request:
        parts.append("by request")
    if target.group_sizes:
        parts.append(f"group size {', '.join(map(str, target.group_sizes))}")
    if target.max_output_error:
        error, gap = target.max_output_error, target.max_gap_nats
        parts.append(f"outputs within {error:g} of training's, loss within {gap:g} nats")
    return "; ".join(parts)


def _lacking(missing: Missing, width: int) -> Iterator[str]:
    """What would make more of them run here, each thing once."""
    reasons: dict[str, list[str]] = {}
    for (scheme, target), lacking in missing.items():
        for reason in lacking:
            reasons.setdefault(reason, []).append(f"{scheme} {target}")
    if reasons:
        yield ""
        yield "Missing here:"
    for reason, targets in reasons.items():
        yield from _wrapped(f"{reason}: for {', '.join(targets)}", width, "  ", "    ")


def _wrapped(text: str, width: int, start: str = "", after: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=start, subsequent_indent=after, break_long_words=False, break_on_hyphens=False
    )
