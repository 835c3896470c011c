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
        help="what `quantize eval` wrote of a converted folder; default: FOLDER-eval beside it or here, if it is there",
    )  # fmt: skip
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """Writes it beside the weights, and says where a folder's numbers are missing."""
    from quantize.release.card import write_release
    from quantize.release.source import evaluation_places, find_release
    from quantize.release.text import check_repository

    if options.repo:
        check_repository(options.repo)
    release = find_release(options.source, options.root, options.repo, options.evaluation)
    print(write_release(release))
    if not release.is_run and not release.evaluation:
        places = " and ".join(map(str, evaluation_places(release.folder)))
        command = f"quantize eval {options.source} --data DATA"
        print(f"it shows no evaluation, as there is none at {places}; for one: {command}, then this again")
