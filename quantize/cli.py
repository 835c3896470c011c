"""`quantize`: the formats and the finalize step, without training. Imports no torch until a verb needs it."""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Sequence

from quantize.commands import VERBS
from quantize.errors import UserError

# A file where a folder should be, rights, a full or read-only disk: the user's, wherever a path of theirs meets them.
_IN_THE_WAY = (
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs a verb, and returns the exit code: 0, 2 (the user's input), 1 (our failure), 130 (Ctrl-C)."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        VERBS[options.verb].run(options)
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command starts again", file=sys.stderr)
        return 130
    except OSError as error:
        if options.debug:
            traceback.print_exc()
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2 if error.filename and error.errno in _IN_THE_WAY else 1
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quantize", description="Formats and conversion of ongrid.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=f"{{{','.join(VERBS)}}}")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.SUMMARY)
        verb.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
