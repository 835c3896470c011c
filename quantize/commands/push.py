"""`quantize push`: a finished run, or a converted folder, onto the hub."""

from __future__ import annotations

import argparse
import sys

from quantize.commands.options import add_root, add_source

SUMMARY = "upload a finished run or a converted folder, with its model card, to the hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is uploaded, and where to. The token is no option: command lines end up in logs."""
    add_source(parser)
    parser.add_argument("--repo", required=True, metavar="ID", help="repository: OWNER/NAME, or NAME for your own")
    parser.add_argument("--private", action="store_true", help="a repository that is created is private")
    parser.add_argument("--revision", help="branch to commit to, created where it is not there (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="list the files and print the card; nothing is sent")
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """Checks everything here, then uploads."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, not in its __all__

    from quantize.release.push import prepare_upload, push

    upload = prepare_upload(options.source, options.root, options.repo)
    for line in upload.listing():
        print(line)
    if options.dry_run:
        print(f"\n{upload.card}")
        print(f"nothing was sent; {len(upload.files)} files would go to {options.repo}")
        return
    if not sys.stderr.isatty():
        disable_progress_bars()
    print(push(upload, private=options.private, revision=options.revision))
