"""`quantize eval`: a model on held-out text and tasks beside a reference, and whether it is good enough."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from quantize.commands.options import add_root

SUMMARY = "measure any model, quantised or not, beside its source: is it good enough?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, against what, and on what."""
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="run, transformers folder, or hub id (OWNER/NAME)")
    parser.add_argument(
        "--against", metavar="MODEL", help="reference, a folder or hub id; default: what a conversion was made from, "
        "or the arms of the run's report",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, help="held-out text: .jsonl (text, messages, or prompt and completion), .txt, or a run's "
        "data/eval.parquet; default: the run's own",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, help="how many of them (default: 128, of a run's own all)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="lm-eval's names, release13, or .yaml")
    parser.add_argument(
        "--engine", choices=["transformers", "vllm"], help="what runs the tasks (default: the run's, or transformers)"
    )
    parser.add_argument("--limit", type=int, help="the first so many samples of each task (default: the run's, or all)")
    parser.add_argument("--num-fewshot", type=int, help="examples in a task's prompt (default: as the task says)")
    parser.add_argument("--batch-size", type=int, help="rows at once (default: the run's, or 8)")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, metavar="NATS",
        help="by how much the loss may be above the reference's, nats per token (default: 0.05, 5%% of perplexity)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder to write; default: RUN/evaluation, or MODEL-eval")
    parser.add_argument(
        "--target", help="where it will run; simulated where this machine cannot, or it was made for another"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code")
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """Measures, and prints tables and the verdict."""
    from quantize.folder_eval.models import Asked
    from quantize.folder_eval.page import terminal
    from quantize.folder_eval.study import evaluate

    def progress(name: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: {done}/{total}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)

    asked = Asked(**{name: value for name, value in vars(options).items() if name not in ("verb", "debug")})
    found, output = evaluate(asked, shlex.join(["quantize", *sys.argv[1:]]), progress)
    print(terminal(found))
    print(f"report: {output / 'report.html'}")
