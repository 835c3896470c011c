"""`quantize export`: a quantised checkpoint in the format of another runtime."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quantize.commands.options import add_root
from quantize.errors import UserError
from quantize.files import is_neither, make_folder, read_mapping, writing_to

SUMMARY = "write what a run ships as ExecuTorch's .pte (XNNPACK, with a KV cache), and run it beside torch"
_LENGTH = 2048
_WEIGHTS = "Int8DynamicActivationIntxWeightConfig"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is exported, where to, and how it is checked."""
    parser.add_argument(
        "source", metavar="RUN_OR_FOLDER", nargs="?", help="run directory or name, or a quantised transformers folder"
    )
    parser.add_argument("--to", choices=("executorch",), default="executorch", help="the runtime")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/export/executorch)")
    parser.add_argument("--max-seq-len", type=int, help=f"tokens the KV cache holds (default: {_LENGTH}, or fewer)")
    parser.add_argument("--layers", type=int, help="only the first so many layers: quick to export, of no other use")
    parser.add_argument("--samples", type=int, default=16, help="held-out samples of a run to check on (default: 16)")
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens to check (default: 32)")
    parser.add_argument(
        "--allow-rounded-scales", action="store_true", help="take scales that XNNPACK rounds to bf16: other numbers"
    )
    parser.add_argument("--setup", action="store_true", help="install ExecuTorch's packages for this Python, and end")
    parser.add_argument("--packages", type=Path, help="where they lie (default: in this Python's own environment)")
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """Refuses what can be seen without torch, exports in a process of its own, and says how it compares."""
    from quantize.export.environment import find_packages, install_packages, packages_folder

    folder = options.packages or packages_folder()
    if options.setup:
        install_packages(folder)
        print(f"ExecuTorch is installed in {folder}")
        return
    if options.source is None:
        raise UserError("say which run or folder to export: quantize export RUN_OR_FOLDER")
    job = make_job(options)
    packages = find_packages(folder)
    output = Path(job["output"])
    make_folder(output.parent, named=output)
    record = _work(job, output.with_name(f"{output.name}.request.json"), packages)
    print("\n".join(describe(record, output)))
    fault = record["against_torch"]["failed"]
    if fault:
        raise RuntimeError(f"{output / 'model.pte'} does not compute what the checkpoint does: {fault}")


def _work(job: dict[str, Any], request: Path, packages: Path) -> dict[str, Any]:
    """The job's record. Its files beside `request` stay only where it failed, as the message names its log."""
    from quantize.worker import run_jobs

    def clear() -> None:
        for path in request.parent.glob(f"{request.stem}.*"):
            path.unlink()

    try:
        (record,) = run_jobs([job], request, packages=packages)
    except UserError:
        clear()
        raise
    clear()
    return record  # type: ignore[no-any-return]


def make_job(options: argparse.Namespace) -> dict[str, Any]:
    """The export's job. Raises UserError for a source that cannot be exported, or an output that is not ours."""
    from quantize.export.architectures import check_architecture
    from quantize.runs import find_run

    found = find_run(options.source, options.root)
    source = found / "quantized" if found else Path(options.source).expanduser()
    if not (source / "config.json").is_file():
        if found:
            raise UserError(f"{found} has no quantized/ yet; finish it first: train --resume {found}")
        raise is_neither(options.source, options.root, "a folder with a config.json")
    config = read_mapping(source / "config.json")
    if "ongrid_packed" in config:
        raise UserError(f"{source} is packed; unpack it first: quantize convert {source} --unpack --output NEW")
    check_format(config, source)
    check_numbers(options)
    length = options.max_seq_len or min(_LENGTH, config.get("max_position_embeddings") or _LENGTH)
    check_architecture(config, length)
    default = found / "export" / "executorch" if found else source.with_name(f"{source.resolve().name}-executorch")
    output = options.output or default
    with writing_to(output):
        if output.exists() and any(output.iterdir()) and not (output / "export.json").is_file():
            raise UserError(f"--output {output} exists and holds no export; name another folder")
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--output {output} lies inside the source {source}, which stays as it is; name another folder")
    samples = found / "data" / "eval.parquet" if found else None
    return {
        "kind": "executorch",
        "name": "export",
        "source": str(source),
        "output": str(output),
        "max_seq_len": length,
        "layers": options.layers,
        "round_scales": options.allow_rounded_scales,
        "samples": str(samples) if samples and samples.is_file() else None,
        "n_samples": options.samples,
        "n_tokens": options.tokens,
    }


def check_numbers(options: argparse.Namespace) -> None:
    """Raises UserError where an option is too small to mean anything."""
    least = {"max_seq_len": 4, "layers": 1, "samples": 1, "tokens": 1}
    for name, smallest in least.items():
        given = getattr(options, name)
        if given is not None and given < smallest:
            raise UserError(f"--{name.replace('_', '-')} {given} is too small; say {smallest} or more")


def check_format(config: dict[str, Any], source: Path) -> None:
    """Raises UserError where a checkpoint is not of a format that XNNPACK's kernels compute."""
    settings = config.get("quantization_config")
    advice = "XNNPACK computes int8-int4 and int8-int4-mobile alone"
    if not settings:
        raise UserError(
            f"{source} is not quantised; {advice}: quantize convert {source} --scheme int8-int4 --target executorch"
        )
    if settings.get("quant_method") != "torchao":
        raise UserError(f"{source} was quantised by {settings.get('quant_method')}, not by torchao; {advice}")
    kinds = set(_types(settings.get("quant_type")))
    kinds = {kind for kind in kinds if kind.endswith(("WeightConfig", "OnlyConfig"))}
    if _WEIGHTS not in kinds or kinds - {_WEIGHTS, "IntxWeightOnlyConfig"}:
        raise UserError(f"{source} holds {', '.join(sorted(kinds)) or 'no known format'}; {advice}")


def _types(value: Any) -> list[str]:
    """Every `_type` in nested JSON."""
    if isinstance(value, dict):
        own = [str(value["_type"])] if "_type" in value else []
        return own + [name for each in value.values() for name in _types(each)]
    return [name for each in value for name in _types(each)] if isinstance(value, list) else []


def describe(record: dict[str, Any], output: Path) -> list[str]:
    """What was written and how it compares, for the terminal."""
    check = record["against_torch"]
    greedy, distance, floor = check["greedy"], check["distance"], check["floor"]
    rounded = record["rounded_scales"]
    lines = [
        f"{output / 'model.pte'}: {record['size_mib']:.1f} MiB, {record['delegated_linears']} layers in XNNPACK, "
        f"KV cache of {record['max_seq_len']} tokens",
        f"greedy tokens equal to torch's: {greedy['equal']} of {len(greedy['torch'])}",
        f"teacher-forced on {check['n_positions']} tokens: argmax equal {distance['argmax_agreement']:.2%}, loss gap "
        f"{distance['loss_gap']:+.4f} nats, |logit difference| {distance['mean_abs']:.4f} mean, "
        f"{distance['max_abs']:.4f} at most",
        f"torch beside itself, embeddings changed by a last bit: argmax equal {floor['argmax_agreement']:.2%}, loss "
        f"gap {floor['loss_gap']:+.4f} nats, {floor['mean_abs']:.4f} mean, {floor['max_abs']:.4f} at most",
    ]
    if rounded:
        lines.append(
            f"rounded: the scales of {rounded['layers']} layers, by up to {rounded['largest_relative_change']:.2%}; "
            "the comparison is with the rounded ones"
        )
    return lines
