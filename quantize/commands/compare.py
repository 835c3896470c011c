"""`quantize compare`: several runs on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from quantize.commands.options import add_root

SUMMARY = "several runs on one page: what differs, and what that changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN ..., --output, --root."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directories or names, or a folder of runs (a sweep)"
    )
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="folder to write (default: comparison)")
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """Writes the page and prints its findings."""
    from quantize.compare import compare_runs

    print(compare_runs(options.runs, options.root, options.output))
    print(f"report: {options.output / 'report.html'}")
