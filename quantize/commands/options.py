"""Options that several verbs share."""

from __future__ import annotations

import argparse

SKIP = "layers to leave unquantised: last parts of their names, blocks, or patterns (down_proj, model.layers.0)"


def add_root(parser: argparse.ArgumentParser) -> None:
    """--root, where names of runs are looked up."""
    parser.add_argument("--root", default="runs", help="where run names are looked up (default: runs)")


def add_source(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_FOLDER."""
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="run directory or name, or a transformers folder")
