"""`quantize card`: the model card of a finished run, or of a folder that `quantize convert` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from quantize.commands.options import add_root, add_source

SUMMARY = "write the model card (README.md) of a finished run or a converted folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_FOLDER, --repo, --evaluation, --root."""
    add_source(parser)
    parser.add_argument("--repo", metavar="ID", help="the repository that its code loads; default: the folder")
    parser.add_argument(
        "--evaluation", type=Path, metavar="FOLDER",
        help="what `quantize eval` wrote of a converted folder; default: FOLDER-eval beside it, where that is there",
    )  # fmt: skip
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """Writes it beside the weights."""
    from quantize.release.card import write_card
    from quantize.release.text import check_repository

    if options.repo:
        check_repository(options.repo)
    print(write_card(options.source, options.root, options.repo, options.evaluation))
