"""What converting a large checkpoint takes: time and peak memory, against reading, writing and the arithmetic alone.

    python benchmarks/convert.py                                     # the plain formats
    python benchmarks/convert.py --formats int8-int4@cpu --repeats 3

Builds a random Qwen3-1.7B shape in bf16 in a temporary folder and deletes it at the end. Each measurement is a process
of its own. The floor is the sum of three things done by themselves: reading the source's bytes, rounding the covered
weights in memory and building torchao's tensors (both in the conversion's pieces), and writing, with fsync, as many
bytes as the result has. The limit of the memory is the 16-bit size and the largest weight.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.schemes import Scheme, Target

FORMATS = ("int8-int4@cpu", "int8@cpu", "fp8@cuda-sm89", "int4@cpu")
SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
TINY = SHAPE | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 256}
"""Converted before the clock starts, so that every library is loaded."""
BLOCK = 2**21  # bytes that the floor writes at a time


def main() -> None:
    """Builds, measures in processes of their own, prints a row a format and all as one line of JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="SCHEME@TARGET", help="what to convert to")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of what stays unquantised"
    )
    parser.add_argument("--layers", type=int, default=28, help="decoder layers (28 = 1.7B)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--repeats", type=int, default=2, help="of each; the least time and the largest memory count")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert-") as place:
        built = run_step("build", options, options.formats[0], place)
        results = [measure(options, wanted, place, built) for wanted in options.formats]
    print(json.dumps(results))


def measure(options: argparse.Namespace, wanted: str, place: str, built: dict[str, Any]) -> dict[str, Any]:
    """Prints and returns the figures of one format, conversion and floor in turn."""
    pairs = [[run_step(step, options, wanted, place) for step in ("convert", "floor")] for _ in range(options.repeats)]
    seconds = min(converted["seconds"] for converted, _ in pairs)
    alone = {f"{part} s": min(floors[part] for _, floors in pairs) for part in ("read", "arithmetic", "write")}
    result = {
        "format": wanted,
        "seconds": seconds,
        **alone,
        "ratio": seconds / sum(alone.values()),
        "peak GiB": max(converted["peak"] for converted, _ in pairs) / 2**30,
        "libraries GiB": max(converted["before"] for converted, _ in pairs) / 2**30,
        "limit GiB": (built["bytes"] + built["largest"]) / 2**30,
        "source GiB": built["bytes"] / 2**30,
        "output GiB": pairs[0][0]["bytes"] / 2**30,
    }
    if wanted == options.formats[0]:
        print(f"| {' | '.join(result)} |\n|{' --- |' * len(result)}")
    cells = [f"{value:.2f}" if isinstance(value, float) else value for value in result.values()]
    print(f"| {' | '.join(cells)} |", flush=True)
    return result


def run_step(step: str, options: argparse.Namespace, wanted: str, place: str) -> dict[str, Any]:
    """One step in a fresh process, whose peak memory is its own."""
    words = [f"--dtype={options.dtype}", f"--layers={options.layers}", f"--folder={place}", f"--step={step}"]
    command = [sys.executable, __file__, "--formats", wanted, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- steps


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the random checkpoint in several files, a piece at a time, and the tiny one."""
    write_random(options.folder / "tiny", TINY)
    return write_random(options.folder / "source", SHAPE | {"num_hidden_layers": options.layers})


def write_random(folder: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """A Qwen3 checkpoint in bf16 of that shape; returns the bytes of all of it and of its largest weight."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from quantize.storage import save_settings, write_weights

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape), dtype=torch.bfloat16)
    outlines = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def data() -> Iterator[tuple[str, int, torch.Tensor]]:
        for key, tensor in outlines.items():
            rows = max(1, len(noise) // tensor[:1].numel())
            for first in range(0, tensor.shape[0], rows):
                part = torch.Size((min(rows, tensor.shape[0] - first), *tensor.shape[1:]))
                yield key, first, noise[: part.numel()].reshape(part)

    folder.mkdir()
    write_weights(folder, outlines, {}, data(), max_shard_size="2GB")
    save_settings(model, folder)
    sizes = [tensor.numel() * 2 for tensor in outlines.values()]
    return {"bytes": sum(sizes), "largest": max(sizes)}


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """The conversion as `quantize convert` runs it."""
    from quantize.convert import convert_checkpoint, folder_bytes

    output = options.folder / "output"
    scheme, target, size = chosen_format(options)

    def once(source: Path) -> None:
        shutil.rmtree(output, ignore_errors=True)
        dtype = target.dtype or options.dtype
        convert_checkpoint(source, output, scheme, target, group_size=size, dtype=dtype, device="cpu")

    once(options.folder / "tiny")
    before, start = peak_bytes(), time.perf_counter()
    once(options.folder / "source")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_bytes(), "before": before, "bytes": folder_bytes(output)}


def floor(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of reading, arithmetic and writing alone."""
    from quantize.convert import folder_bytes

    read_and_round(options, options.folder / "tiny")
    reading, arithmetic = read_and_round(options, options.folder / "source")
    block, left, path = os.urandom(BLOCK), folder_bytes(options.folder / "output"), options.folder / "written"
    start = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        while left > 0:
            left -= stream.write(block[: min(left, len(block))])
        os.fsync(stream.fileno())
    written = time.perf_counter() - start
    path.unlink()
    return {"read": reading, "arithmetic": arithmetic, "write": written}


def read_and_round(options: argparse.Namespace, source: Path) -> tuple[float, float]:
    """Seconds of reading a checkpoint in pieces, and of making what ships of each piece."""
    import torch

    from quantize.convert import inspect_model
    from quantize.grid import quantise_weight
    from quantize.layers import select_layers
    from quantize.stream import PIECE
    from quantize.tensor_files import read_folder

    scheme, target, size = chosen_format(options)
    covered = set(select_layers(inspect_model(source), scheme, size, target).layers)
    dtype = getattr(torch, target.dtype or options.dtype)
    reading = arithmetic = 0.0
    for name, place in read_folder(source)[0].items():
        rows = max(1, PIECE * place.dtype.itemsize // place.row_bytes)
        for first in range(0, place.shape[0], rows):
            start = time.perf_counter()
            weight = place.read(first, rows)
            middle = time.perf_counter()
            if name.removesuffix(".weight") in covered:
                target.tensor(quantise_weight(weight.to(dtype), target, size), dtype)
            reading, arithmetic = reading + middle - start, arithmetic + time.perf_counter() - middle
    return reading, arithmetic


STEPS = {"build": build, "convert": convert, "floor": floor}


def chosen_format(options: argparse.Namespace) -> tuple[Scheme, Target, int | None]:
    """The one format of a step, with its group size."""
    from quantize.schemes import find_scheme

    name, _, where = options.formats[0].partition("@")
    scheme = find_scheme(name)
    target = scheme.find_target(where) if where else next(iter(scheme.targets.values()))
    return scheme, target, scheme.pick_group_size(None, target)


def peak_bytes() -> int:
    """The largest resident set of this process so far, as Linux counts it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM: this benchmark needs Linux")


if __name__ == "__main__":
    main()
