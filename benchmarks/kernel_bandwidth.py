"""What share of the GPU's copy bandwidth the fused kernels reach, by format and by the shapes of a model's layers.

    python benchmarks/kernel_bandwidth.py --shape qwen3-1.7b --out kernels.jsonl

A kernel moves at least what it reads and writes once; that over its time, over the same for a device-to-device copy of
1 GiB, is its share. Weights and inputs rotate among enough copies that none is found in the L2 cache; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step_time import SHAPES
from torch import Tensor

from qat.kernels import FusedPath, Layer, fused_path
from quantize import float8, integers
from quantize.numerics import Quantised

FORMATS = {
    "int8-int4 g32": (integers.INT8_INT4, 32),
    "int4 tinygemm g128": (integers.TINYGEMM, 128),
    "fp8 rows": (float8.FP8, None),
    "int8 rows": (integers.INT8_ROWS, None),
    "int4 mslk g128": (integers.INT4_MSLK, 128),
    "fp8 mslk rows": (float8.FP8_MSLK, None),
}


def main() -> int:
    """Prints one line a kernel and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line a kernel")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this measures a GPU, and there is none", file=sys.stderr)
        return 2
    copy = copy_bandwidth()
    header = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": round(copy)}
    print(json.dumps(header), flush=True)
    for line in measure(options):
        line["share"] = round(line["gb_s"] / copy, 3)
        print(json.dumps(line), flush=True)
        if options.out is not None:
            with options.out.open("a") as out:
                out.write(json.dumps(header | line) + "\n")
    return 0


def measure(options: argparse.Namespace) -> Any:
    """One line a kernel: its least traffic in GB/s."""
    shape = SHAPES[options.shape]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    query, key = (shape[heads] * shape["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    # As training launches them: the layers that share an input together.
    layers = {"q, k, v": ((query, key, key), hidden), "o": ((hidden,), query), "gate, up": ((inner, inner), hidden)}
    layers["down"] = ((hidden,), inner)
    for name, (numbers, group) in FORMATS.items():
        path = fused_path(numbers)
        assert path is not None
        lines = []
        for layer, (rows, columns) in layers.items():
            lines.append(weight(path, group, rows, columns, options))
            yield {"kernel": "weight", "format": name, "layer": layer, **lines[-1]}
        moved = sum(line["gb_s"] * line["us"] for line in lines)
        total = sum(line["us"] for line in lines)
        yield {"kernel": "weight", "format": name, "layer": "all", "us": round(total, 1), "gb_s": moved / total}
        for width in sorted({hidden, query, inner}):
            if path.kind != "none":
                yield {"kernel": "inputs", "format": name, "columns": width, **inputs(path, width, options.tokens)}
        yield {"kernel": "swiglu", "format": name, "columns": inner, **swiglu(path, inner, options.tokens)}


def weight(
    path: FusedPath, group: int | None, rows: tuple[int, ...], columns: int, options: argparse.Namespace
) -> dict[str, Any]:
    """W + s B A -> the fake-quantised weight, of layers that share their input."""

    def layer(count: int) -> Layer:
        w, a, b = (
            torch.randn(*size, device="cuda") * 0.02
            for size in ((count, columns), (options.rank, columns), (count, options.rank))
        )
        return Layer(w.bfloat16(), a, b, 1.0, None, group, torch.bfloat16)

    copies = max(2, -(-256 * 2**20 // (2 * sum(rows) * columns)))
    groups = [[layer(count) for count in rows] for _ in range(copies)]
    (out,) = path.weights(groups[0], torch.bfloat16)
    read = torch.empty(sum(rows), columns, dtype=torch.bfloat16)
    return _line([partial(path.weights, layers, torch.bfloat16) for layers in groups], read, out)


def inputs(path: FusedPath, columns: int, tokens: int) -> dict[str, Any]:
    """x -> x on its grid."""
    batches = [torch.randn(tokens, columns, device="cuda").bfloat16() for _ in range(8)]
    return _line([partial(path.inputs, x) for x in batches], batches[0], path.inputs(batches[0]))


def swiglu(path: FusedPath, columns: int, tokens: int) -> dict[str, Any]:
    """gate, up -> silu(gate) * up on its grid."""
    pairs = [torch.randn(2, tokens, columns, device="cuda").bfloat16() for _ in range(3)]
    return _line([partial(path.swiglu, x[0], x[1]) for x in pairs], pairs[0], path.swiglu(*pairs[0]))


def _line(calls: list[Callable[[], Any]], read: Tensor, written: Tensor | Quantised) -> dict[str, Any]:
    size = read.nbytes + (written.nbytes if isinstance(written, Tensor) else written.values.nbytes)
    microseconds = median_time(calls)
    return {"us": round(microseconds, 1), "gb_s": size / microseconds / 1e3}


def median_time(calls: list[Callable[[], Any]], repeats: int = 25) -> float:
    """Microseconds a call, in a CUDA graph of all of them: no gaps between launches."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * float(start.elapsed_time(end)) / len(calls))
    del kept
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s read and written by a copy of 1 GiB from device to device."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_time([lambda: target.copy_(source)]) / 1e3


if __name__ == "__main__":
    sys.exit(main())
