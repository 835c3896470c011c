"""`quantize`: the formats and the finalize step, without training. Imports no torch until a verb needs it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from quantize.errors import UserError
from quantize.files import is_neither, make_folder, writing_to
from quantize.schemes import SCHEMES, find_scheme

# A file where a folder should be, rights, a full or read-only disk: the user's, wherever a path of theirs meets them.
_IN_THE_WAY = (
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG
)  # fmt: skip
_SKIP = "layers to leave unquantised: last parts of their names, blocks, or patterns (down_proj, model.layers.0)"


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs a verb, and returns the exit code: 0, 2 (the user's input), 1 (our failure), 130 (Ctrl-C)."""
    parser = _parser()
    options = parser.parse_args(argv)
    verbs = {"schemes": _schemes, "convert": _convert, "compare": _compare, "sensitivity": _sensitivity}
    try:
        verbs[options.verb](options)
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
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{schemes,convert,compare,sensitivity}")
    verbs.add_parser("schemes", help="print the formats: bits, groups, where they run, how fast, what is missing here")
    convert = verbs.add_parser("convert", help="quantise a run's merged weights, or any checkpoint folder")
    convert.add_argument("source", metavar="RUN_OR_FOLDER", help="run directory or name, or a transformers folder")
    convert.add_argument("--scheme", help="format of a plain folder; a run knows its own")
    convert.add_argument("--target", help="where it will run; default: what this machine runs")
    convert.add_argument("--group-size", type=int, help="weights per scale; default: the scheme's own")
    convert.add_argument("--skip", nargs="+", default=[], metavar="NAME", help=_SKIP)
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), help="weights that stay unquantised")
    convert.add_argument("--output", type=Path, help="folder to write, for a plain folder")
    convert.add_argument("--root", default="runs", help="where run names are looked up (default: runs)")
    compare = verbs.add_parser("compare", help="several runs on one page: what differs, and what that changed")
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directories or names, or a folder of runs (a sweep)"
    )
    compare.add_argument(
        "--output", type=Path, default=Path("comparison"), help="folder to write (default: comparison)"
    )
    compare.add_argument("--root", default="runs", help="where run names are looked up (default: runs)")
    sensitivity = verbs.add_parser(
        "sensitivity", help="which layers a format hurts, one group at a time, and what to leave unquantised"
    )
    sensitivity.add_argument("source", metavar="RUN_OR_FOLDER", help="run directory or name, or a transformers folder")
    sensitivity.add_argument("--scheme", help="format; default: the run's")
    sensitivity.add_argument("--target", help="where it will run; simulated where this machine cannot")
    sensitivity.add_argument("--group-size", type=int, help="weights per scale; default: the run's, else the scheme's")
    sensitivity.add_argument(
        "--data", type=Path, help="held-out text: .jsonl (text, messages, or prompt and completion), .txt, or a run's "
        "data/eval.parquet; default: the run's own",
    )  # fmt: skip
    sensitivity.add_argument("--samples", type=int, default=128, help="how many of them (default: 128)")
    sensitivity.add_argument("--batch-size", type=int, default=8, help="rows at once (default: 8)")
    sensitivity.add_argument(
        "--by", nargs="+", choices=("block", "kind", "layer"), default=["block", "kind"],
        help="groups of layers (default: block kind)",
    )  # fmt: skip
    sensitivity.add_argument(
        "--growth", type=float, default=0.1, help="share by which the weights may grow (default: 0.1)"
    )
    sensitivity.add_argument("--output", type=Path, help="folder to write; default: RUN/sensitivity, or sensitivity")
    sensitivity.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code")
    sensitivity.add_argument("--root", default="runs", help="where run names are looked up (default: runs)")
    for sub in verbs.choices.values():
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _schemes(options: argparse.Namespace) -> None:
    from quantize.hardware import missing_for

    for scheme in SCHEMES.values():
        groups = ", ".join(map(str, scheme.group_sizes)) or "per row"
        print(f"{scheme.name}: {scheme.summary}")
        print(f"  {scheme.bits:g} bits; group size {scheme.group_size or 'per row'} (of {groups})")
        for target in scheme.targets.values():
            missing = missing_for(target)
            print(f"  {target.name}: {'runs here' if not missing else 'missing here: ' + '; '.join(missing)}")
            print(f"    speed: {target.speed or 'not measured'}")


def _compare(options: argparse.Namespace) -> None:
    from quantize.compare import compare_runs

    print(compare_runs(options.runs, options.root, options.output))
    print(f"report: {options.output / 'report.html'}")


def _sensitivity(options: argparse.Namespace) -> None:
    from quantize.sensitivity_report import Asked, study

    def progress(name: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} samples", end="\n" if done == total else "", file=sys.stderr, flush=True)

    named = {name: value for name, value in vars(options).items() if name not in ("verb", "debug", "by")}
    text, output = study(Asked(ways=options.by, **named), progress)
    print(text)
    print(f"report: {output / 'report.html'}")


def _convert(options: argparse.Namespace) -> None:
    source = Path(options.source)
    from quantize.finish import finish_run
    from quantize.runs import find_run

    run = find_run(options.source, options.root)
    if run is not None:
        for name in ("scheme", "group_size", "skip", "dtype", "output"):
            if getattr(options, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag}: a run ships what it was trained for, into its own folder; leave it out")
        metrics = finish_run(run, target=options.target)
        print(f"{run / 'quantized'}: loss {metrics['final']['loss']:.4f}; the report is {run / 'report.md'}")
        return
    if not (source / "config.json").is_file():
        raise is_neither(options.source, options.root, "a folder with a config.json")
    if not options.scheme:
        raise UserError(f"{source} is a plain checkpoint: say --scheme, one of {', '.join(SCHEMES)}")
    _convert_folder(source, options)


def _convert_folder(source: Path, options: argparse.Namespace) -> None:
    from quantize.hardware import missing_for, pick_target
    from quantize.worker import run_jobs

    scheme = find_scheme(options.scheme)
    target, missing = pick_target(scheme, options.target)
    if missing:
        here = [other.name for other in scheme.targets.values() if not missing_for(other)]
        hint = f"; --target {' or '.join(here)} runs here" if here else ""
        raise UserError(f"{scheme.name} for {target.name}: this machine lacks {'; '.join(missing)}{hint}")
    if target.dtype and options.dtype not in (None, target.dtype):
        raise UserError(f"--dtype {options.dtype}: {scheme.name} for {target.name} computes in {target.dtype}")
    named = Path(os.path.abspath(source))  # "." has no name
    output = options.output or named.with_name(f"{named.name}-{scheme.name}")
    with writing_to(output):
        if output.exists() and any(output.iterdir()):
            raise UserError(f"--output {output} exists and is not empty; name another folder")
    make_folder(output.parent, named=output)
    job = {
        "kind": "convert",
        "name": "convert",
        "source": str(source),
        "output": str(output),
        "scheme": scheme.name,
        "target": target.name,
        "group_size": scheme.pick_group_size(options.group_size, target),
        "skip": options.skip,
        "dtype": options.dtype or target.dtype or "float32",
    }
    (result,) = run_jobs([job], output.with_name(f"{output.name}.request.json"))
    for path in output.parent.glob(f"{output.name}.request.*"):
        path.unlink()
    coverage = result["coverage"]
    print(f"{output}: {coverage['quantized_layers']} layers, {coverage['share_of_all_weights']:.1%} of all weights")
    for name, reason in coverage["skipped"].items():
        print(f"  not quantised: {name} ({reason})")
