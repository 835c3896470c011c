"""The verbs of `quantize`, one module each: SUMMARY (for --help), `add_arguments(parser)` and `run(options)`.

None of them imports torch at module level, so that `quantize --help` stays quick.
"""

from __future__ import annotations

import argparse
from typing import Protocol

from quantize.commands import card, compare, convert, doctor, eval, export, push, schemes, sensitivity, serve


class Verb(Protocol):
    """What a module of this package holds."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the verb's own options."""

    def run(self, options: argparse.Namespace) -> None:
        """Does it. Raises UserError for what the user gave."""


EXAMPLES = {
    "doctor": "quantize doctor --json > doctor.json",
    "schemes": "quantize schemes int8-int4 fp8",
    "convert": "quantize convert RUN/merged --scheme int4 --target cpu --output small",
    "eval": "quantize eval small --data RUN/data/eval.parquet",
    "export": "quantize export RUN",
    "serve": "quantize serve RUN --smoke-test",
    "compare": "quantize compare first second",
    "sensitivity": "quantize sensitivity RUN",
    "card": "quantize card small",
    "push": "quantize push RUN --repo OWNER/NAME --dry-run",
}
"""One command a verb, for the end of its --help."""

VERBS: dict[str, Verb] = {
    "doctor": doctor,
    "schemes": schemes,
    "convert": convert,
    "eval": eval,
    "export": export,
    "serve": serve,
    "compare": compare,
    "sensitivity": sensitivity,
    "card": card,
    "push": push,
}
