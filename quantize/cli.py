"""`quantize`: the formats and the finalize step, without training. Imports no torch until a verb needs it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from quantize.commands import EXAMPLES, VERBS
from quantize.errors import UserError

# A file where a folder should be, rights, a full or read-only disk: the user's, wherever a path of theirs meets them.
_IN_THE_WAY = (
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs a verb, and returns the exit code: 0, 2 (the user's input), 1 (our failure), 130 (Ctrl-C)."""
    parser = _parser()
    words, further = _split(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(words)
    if further is not None:
        options.further = further
    if options.verb is None:
        parser.print_help(sys.stderr)
        return 2
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
    except BrokenPipeError:
        # Nobody reads on, as with `| head`; Python's own flush at exit must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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


def _split(words: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Our own words, and those after `--`, for the program that the verb starts: argparse would mix them up.

    None of a verb that starts none.
    """
    own = list(words)
    if not (own and own[0] in VERBS and getattr(VERBS[own[0]], "PASSES_ON", False)):
        return own, None
    at = own.index("--") if "--" in own else len(own)
    return own[:at], own[at + 1 :]


class _Version(argparse.Action):
    """Looks the version up only where it is asked for: a checkout that is not installed has none."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from quantize.hardware import installed

        print(f"ongrid {installed(['ongrid']).get('ongrid', '(not installed)')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantize",
        description="Formats, conversion, measurement and release of ongrid; training is the command `train`.",
        epilog="`quantize VERB --help` says more, with an example.",
    )
    parser.add_argument("--version", action=_Version, help="print the version, and end")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, verb in VERBS.items():
        summary = verb.SUMMARY[0].upper() + verb.SUMMARY[1:]
        sub = verbs.add_parser(
            name,
            help=verb.SUMMARY,
            description=summary if summary.endswith("?") else f"{summary}.",
            epilog=f"example: {EXAMPLES[name]}" if name in EXAMPLES else None,
        )
        verb.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
