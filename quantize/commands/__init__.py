"""The verbs of `quantize`, one module each: SUMMARY (for --help), `add_arguments(parser)` and `run(options)`.

None of them imports torch at module level, so that `quantize --help` stays quick.
"""

from __future__ import annotations

import argparse
from typing import Protocol

from quantize.commands import card, compare, convert, doctor, eval, export, push, schemes, sensitivity


class Verb(Protocol):
    """What a module of this package holds."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the verb's own options."""

    def run(self, options: argparse.Namespace) -> None:
        """Does it. Raises UserError for what the user gave."""


VERBS: dict[str, Verb] = {
    "doctor": doctor,
    "schemes": schemes,
    "convert": convert,
    "eval": eval,
    "export": export,
    "compare": compare,
    "sensitivity": sensitivity,
    "card": card,
    "push": push,
}
