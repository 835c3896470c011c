"""`quantize doctor`: what this machine can train, run and export, and the command for what is missing."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from quantize.commands.options import add_root
from quantize.errors import UserError

SUMMARY = "what this machine can train, run and export, and the command for what is missing"
_CODES = (
    "It takes some seconds and changes nothing. Exit code 0: something can be trained and shipped here, though some of "
    "it may be slow, simulated or missing; 2: nothing can, as a package that everything needs is missing or broken."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--imports, --json, --root."""
    parser.description = f"Says {SUMMARY}. {_CODES}"
    parser.add_argument(
        "--imports", action="store_true",
        help="also import unsloth, trl and other slow packages, each in a process of its own (up to some minutes)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print it as JSON, for a bug report; it holds no secrets")
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """Prints the page. Raises UserError where nothing can be trained and shipped."""
    from quantize.doctor.examine import examine, page

    found = examine(Path(options.root), imports=options.imports)
    if options.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        width = min(shutil.get_terminal_size().columns, 120) if sys.stdout.isatty() else sys.maxsize
        for line in page(found, width):
            print(line)
    if found.faults:
        raise UserError(*found.faults)
