"""`quantize sensitivity`: which layers a format hurts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quantize.commands.options import add_root, add_source

SUMMARY = "which layers a format hurts, one group at a time, and what to leave unquantised"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is scanned, on which text, and how."""
    add_source(parser)
    parser.add_argument("--scheme", help="format; default: the run's")
    parser.add_argument("--target", help="where it will run; simulated where this machine cannot")
    parser.add_argument("--group-size", type=int, help="weights per scale; default: the run's, else the scheme's")
    parser.add_argument(
        "--data", type=Path, help="held-out text: .jsonl (text, messages, or prompt and completion), .txt, or a run's "
        "data/eval.parquet; default: the run's own",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=128, help="how many of them (default: 128)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at once (default: 8)")
    parser.add_argument(
        "--by", nargs="+", choices=("block", "kind", "layer"), default=["block", "kind"],
        help="groups of layers (default: block kind)",
    )  # fmt: skip
    parser.add_argument("--growth", type=float, default=0.1, help="share by which the weights may grow (default: 0.1)")
    parser.add_argument("--output", type=Path, help="folder to write; default: RUN/sensitivity, or sensitivity")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code")
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """Scans, and prints what to leave unquantised."""
    from quantize.sensitivity_report import Asked, study

    def progress(name: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} samples", end="\n" if done == total else "", file=sys.stderr, flush=True)

    named = {name: value for name, value in vars(options).items() if name not in ("verb", "debug", "by")}
    text, output = study(Asked(ways=options.by, **named), progress)
    print(text)
    print(f"report: {output / 'report.html'}")
