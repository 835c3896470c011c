"""`quantize convert`: real quantisation of a run's merged weights, or of any checkpoint; packing and unpacking."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from quantize.algorithms import are_calibrated, check_algorithms, describe_algorithms
from quantize.calibrate import SAMPLES
from quantize.commands.options import SKIP, add_root
from quantize.commands.recipe import DTYPES, take_recipe
from quantize.errors import UserError
from quantize.files import make_folder, read_mapping, writing_to
from quantize.schemes import SCHEMES, find_scheme
from quantize.task_files import check_names, task_name

SUMMARY = "quantise a run's merged weights, or any checkpoint; pack or unpack what is quantised"

_OF_PLAIN = (
    "scheme", "group_size", "skip", "dtype", "output", "revision", "max_shard_size", "packed", "unpack", "algorithm",
    "calibration", "calibration_samples",
)  # fmt: skip


_INSTEAD = {
    "packed": "; its folder {folder}/quantized can be packed",
    "algorithm": " (in a config it is quantize.algorithm)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is converted, into which format, and where to."""
    parser.add_argument(
        "source", metavar="RUN_OR_MODEL", nargs="?", help="run, transformers folder, or hub id (OWNER/NAME)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="RECIPE", help="YAML with `model` and any of these options (configs/release/)"
    )
    parser.add_argument("--scheme", help="format of a plain checkpoint; a run knows its own")
    parser.add_argument("--target", help="where it will run; default: what this machine runs")
    parser.add_argument("--group-size", type=int, help="weights per scale; default: the scheme's own")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help=SKIP)
    parser.add_argument(
        "--algorithm", nargs="+", default=[], metavar="NAME",
        help=f"what chooses the numbers, one of a kind: {describe_algorithms()}; default: rtn",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", metavar="DATA", help="text for the algorithms that look at activations: .jsonl (text, "
        "messages, or prompt and completion), .txt, a run's data/train.parquet, or task:NAME, the last samples of a "
        "benchmark, which its evaluation then leaves out",
    )  # fmt: skip
    parser.add_argument("--calibration-samples", type=int, metavar="N", help=f"how many of them (default: {SAMPLES})")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="weights that stay unquantised; default: the target's, else the source's own"
    )
    parser.add_argument("--output", type=Path, help="folder to write, for a plain checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="largest file (default: 5GB)")
    parser.add_argument("--packed", action="store_true", help="2 to 7 bits at their width on disk; see --unpack")
    parser.add_argument("--unpack", action="store_true", help="restore torchao's form of a packed folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own model code")
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """A run ships what it was trained for, a plain checkpoint what is asked for."""
    from quantize.finish import finish_run
    from quantize.runs import find_run
    from quantize.sources import find_source

    if options.config is not None:
        take_recipe(options)
    if options.source is None:
        raise UserError("say what to convert: quantize convert RUN_OR_MODEL, or --config RECIPE with a `model`")
    folder = find_run(options.source, options.root)
    if folder is not None:
        for name in _OF_PLAIN:
            if getattr(options, name):
                flag = f"--{name.replace('_', '-')}"
                more = _INSTEAD.get(name, "").format(folder=folder)
                raise UserError(f"{flag}: a run ships what it was trained for, into its own folder; leave it out{more}")
        metrics = finish_run(folder, target=options.target)
        print(f"{folder / 'quantized'}: loss {metrics['final']['loss']:.4f}; the report is {folder / 'report.md'}")
        return
    source = find_source(
        options.source, options.root, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    named = Path(os.path.abspath(options.source)) if Path(options.source).is_dir() else Path(options.source).absolute()
    if options.unpack or (options.packed and not options.scheme):
        _repack_folder(source, named, options)
        return
    if not options.scheme:
        raise UserError(f"{options.source} is a plain checkpoint: say --scheme, one of {', '.join(SCHEMES)}")
    _convert_folder(source, named, options)


def _output(source: Path, named: Path, ending: str, options: argparse.Namespace) -> Path:
    """Where the result goes: what is asked for, else beside a folder, or here for a hub id."""
    beside = named.with_name(f"{named.name}-{ending}") if source.resolve() == named.resolve() else Path.cwd()
    output: Path = options.output or (beside if beside != Path.cwd() else Path.cwd() / f"{named.name}-{ending}")
    with writing_to(output):
        if output.exists() and any(output.iterdir()):
            raise UserError(f"--output {output} exists and is not empty; name another folder")
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--output {output} lies inside the source {source}, which stays as it is; name another folder")
    make_folder(output.parent, named=output)
    return output


def _convert_folder(source: Path, named: Path, options: argparse.Namespace) -> None:
    from quantize.hardware import missing_for, pick_target
    from quantize.sources import check_source

    scheme = find_scheme(options.scheme)
    target, missing = pick_target(scheme, options.target)
    if missing:
        here = [other.name for other in scheme.targets.values() if not missing_for(other)]
        hint = f"; --target {' or '.join(here)} runs here" if here else ""
        raise UserError(f"{scheme.name} for {target.name}: this machine lacks {'; '.join(missing)}{hint}")
    if target.dtype and options.dtype not in (None, target.dtype):
        raise UserError(f"--dtype {options.dtype}: {scheme.name} for {target.name} computes in {target.dtype}")
    group_size = scheme.pick_group_size(options.group_size, target)
    ordered = _algorithms(source, options)
    output = _output(source, named, scheme.name, options)
    check_source(source, trust_remote_code=options.trust_remote_code)
    calibrates = task_name(options.calibration)
    if calibrates:
        check_names([calibrates])
    job = {
        "kind": "convert",
        "name": "convert",
        "source": str(source),
        "output": str(output),
        "scheme": scheme.name,
        "target": target.name,
        "group_size": group_size,
        "skip": options.skip,
        "dtype": options.dtype or target.dtype or own_dtype(source),
        "algorithms": ordered,
        "calibration": {
            "data": str(Path(options.calibration).expanduser()) if options.calibration and not calibrates else None,
            "task": calibrates,
            "samples": options.calibration_samples,
        },
        "named": str(source.resolve()) if Path(options.source).expanduser().is_dir() else options.source,
        "revision": options.revision,
        "max_shard_size": options.max_shard_size,
        "trust_remote_code": options.trust_remote_code,
    }
    if not options.packed:
        (result,) = _work([job], output)
    else:
        unpacked = output.with_name(f"{output.name}.unpacked")  # a whole folder of its own until it is packed
        try:
            pack = {"kind": "repack", "name": "pack", "source": str(unpacked), "output": str(output), "unpack": False}
            result, _ = _work([job | {"output": str(unpacked)}, pack], output)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
    coverage = result["coverage"]
    print(f"{output}: {coverage['quantized_layers']} layers, {coverage['share_of_all_weights']:.1%} of all weights")
    print(f"  {_mib(output)} on disk, {_mib(source)} before")
    for line in (*result.get("notes", ()), *_calibrated(result.get("calibration"))):
        print(f"  {line}")
    for name, reason in coverage["skipped"].items():
        print(f"  not quantised: {name} ({reason})")


def own_dtype(source: Path) -> str:
    """The dtype of a checkpoint's weights as its config.json says; float16 becomes float32, which holds it exactly."""
    settings = read_mapping(source / "config.json")
    found = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return found if found in DTYPES else "float32"


def _algorithms(source: Path, options: argparse.Namespace) -> list[str]:
    """What is asked for, in the order in which it works.

    Raises:
        UserError: it is unknown, does not combine, lacks data, or would throw a training away.
    """
    ordered = list(check_algorithms(options.algorithm))
    if ordered == ["rtn"]:
        ordered = []
    if options.calibration_samples is not None and options.calibration_samples < 1:
        raise UserError(f"--calibration-samples {options.calibration_samples}: say 1 or more")
    trained = source.resolve().parent / "config.resolved.json"
    if ordered and source.resolve().name == "merged" and trained.is_file() and read_mapping(trained).get("qat"):
        raise UserError(
            f"--algorithm {' '.join(ordered)}: {source} was trained on the grid that ships (qat), and choosing other "
            f"numbers would throw that training away; convert the run itself: quantize convert {trained.parent}"
        )
    wants = are_calibrated(ordered)
    if wants and not options.calibration:
        raise UserError(
            f"--algorithm {' '.join(ordered)} looks at activations; name some text: --calibration FILE, or task:NAME"
        )
    if options.calibration and not wants:
        said = f"{' '.join(ordered)} looks" if ordered else "round-to-nearest looks"
        raise UserError(f"--calibration {options.calibration}: {said} at no activations; leave it out")
    return ordered


def _calibrated(about: dict[str, Any] | None) -> list[str]:
    if not about:
        return []
    return [f"calibrated on {about['samples']} samples of {about['data']}, {about['tokens']:,} tokens"]


def _repack_folder(source: Path, named: Path, options: argparse.Namespace) -> None:
    from quantize.packed import is_packed

    for name in ("target", "group_size", "skip", "dtype", "scheme", "max_shard_size"):
        if getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: packing and unpacking change no number; leave it out")
    if options.unpack and options.packed:
        raise UserError("--packed and --unpack undo each other; say one of them")
    if options.unpack != is_packed(source):
        raise UserError(f"{source} is {'not packed' if options.unpack else 'packed already; restore it with --unpack'}")
    output = _output(source, named, "unpacked" if options.unpack else "packed", options)
    job = {"kind": "repack", "name": "repack", "source": str(source), "output": str(output), "unpack": options.unpack}
    _work([job], output)
    print(f"{output}: {_mib(output)} on disk, {_mib(source)} before")


def _work(jobs: list[dict[str, Any]], output: Path) -> list[Any]:
    from quantize.worker import run_jobs

    request = output.with_name(f"{output.name}.request.json")

    def clear() -> None:
        for path in output.parent.glob(f"{output.name}.request.*"):
            path.unlink()

    try:
        results = run_jobs(jobs, request)
    except UserError:
        clear()
        raise
    clear()  # after another failure its log is told of, and stays
    return results


def _mib(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 2**20:,.1f} MiB"
