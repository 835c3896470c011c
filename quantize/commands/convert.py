"""`quantize convert`: real quantisation of a run's merged weights, or of any checkpoint folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from quantize.commands.options import SKIP, add_root, add_source
from quantize.errors import UserError
from quantize.files import is_neither, make_folder, writing_to
from quantize.schemes import SCHEMES, find_scheme

SUMMARY = "quantise a run's merged weights, or any checkpoint folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is converted, into which format, and where to."""
    add_source(parser)
    parser.add_argument("--scheme", help="format of a plain folder; a run knows its own")
    parser.add_argument("--target", help="where it will run; default: what this machine runs")
    parser.add_argument("--group-size", type=int, help="weights per scale; default: the scheme's own")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help=SKIP)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="weights that stay unquantised")
    parser.add_argument("--output", type=Path, help="folder to write, for a plain folder")
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """A run ships what it was trained for, a plain folder what is asked for."""
    from quantize.finish import finish_run
    from quantize.runs import find_run

    source = Path(options.source)
    folder = find_run(options.source, options.root)
    if folder is not None:
        for name in ("scheme", "group_size", "skip", "dtype", "output"):
            if getattr(options, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag}: a run ships what it was trained for, into its own folder; leave it out")
        metrics = finish_run(folder, target=options.target)
        print(f"{folder / 'quantized'}: loss {metrics['final']['loss']:.4f}; the report is {folder / 'report.md'}")
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
