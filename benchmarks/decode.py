"""How fast the shipped formats generate: decode and prefill against bf16, by batch size, and what the weights take.

    python benchmarks/decode.py --shape qwen3-8b --formats bf16 int4 fp8 int8 --batches 1 8 64 256 --out decode.jsonl
    python benchmarks/decode.py --shape tiny --formats float32 int8-int4 --batches 1 2 --new 4 --prompts 1x32  # CPU

Random weights in the true shape; lm_head and embedding stay in 16 bit, as the schemes ship them. Each format is a
process of its own, one after the other; ratios are against the first, which is measured again at the end: its own ratio
shows what the machine drifted. Timed as a run's report does (`quantize.timing`): on a GPU the decoder layers are
compiled, the cache has a fixed size, and a decoding step, or the prefill of a prompt, is one CUDA graph.
`SCHEME@TARGET` names a target: `int4@cuda-sm90-mslk`; `+eager` after a format leaves its layers uncompiled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from step_time import SHAPES

CONTEXT = 256
"""Tokens that a decoding step attends to."""


def main() -> int:
    """Runs the formats one after the other, prints one line a format and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int4", "fp8", "int8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--new", type=int, default=32, help="decoding steps in a measurement")
    parser.add_argument(
        "--prompts", nargs="+", type=_prompts, default=[(1, 4096)], metavar="BATCHxTOKENS", help="of the prefill"
    )
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--limit", type=float, default=240, help="seconds a format may take")
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line each")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _measure(options)
    again = options.formats[:1] if len(options.formats) > 1 else []
    base: dict[tuple[str, int], float] = {}
    complete = True
    run = time.strftime("%Y-%m-%dT%H:%M", time.gmtime())
    for number, name in enumerate([*options.formats, *again]):
        lines = _run(name, options)
        complete &= len(lines) == len(options.batches) + len(options.prompts)
        if number == 0:
            base = {_case(line): line["ms"] for line in lines}
        for line in lines:
            reference = base.get(_case(line))
            line = {"run": run, **line, "x": None if reference is None else round(reference / line["ms"], 3)}
            print(json.dumps(line), flush=True)
            if options.out is not None:
                with options.out.open("a") as out:
                    out.write(json.dumps(line) + "\n")
    return 0 if complete else 1


def _prompts(text: str) -> tuple[int, int]:
    batch, tokens = text.split("x")
    return int(batch), int(tokens)


def _case(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["what"], line["batch"], line.get("tokens")


def _run(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
        output, errors = done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        output, errors = ((part or b"").decode() for part in (error.stdout, error.stderr))
        errors += f"\nstopped after {options.limit:g} seconds"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"format"')]
    if len(lines) < len(options.batches) + len(options.prompts):
        print(f"{name}:", *errors.splitlines()[-15:], sep="\n  ", file=sys.stderr, flush=True)
    return lines


# ---------------------------------------------------------------------- in a format's process


def _measure(options: argparse.Namespace) -> int:
    import torch

    from quantize.timing import StepTimer

    cuda = torch.cuda.is_available()
    name, _, how = options.child.partition("+")
    assert how in ("", "eager"), f"+{how} is not known"
    model, weights, group_size = _build(name, options, "cuda" if cuda else "cpu")
    about = {"format": options.child, "shape": options.shape, "layers": model.config.num_hidden_layers}
    about |= {"group_size": group_size, "weights_gib": round(weights / 2**30, 3), "torch": torch.__version__}
    about["device"] = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    with StepTimer(model, compiled=not how, calls=options.new) as timer:
        for batch in options.batches:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            _say(about | {"what": "decode", "batch": batch}, timer.decode_ms(batch, CONTEXT))
        for batch, tokens in options.prompts:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            _say(about | {"what": "prefill", "batch": batch, "tokens": tokens}, timer.prefill_ms(batch, tokens))
    return 0


def _say(about: dict[str, Any], milliseconds: float) -> None:
    import torch

    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    line = {**about, "ms": round(milliseconds, 4)}
    print(json.dumps(line | {"peak_gib": None if peak is None else round(peak, 3)}), flush=True)


def _build(wanted: str, options: argparse.Namespace, device: str) -> tuple[Any, int, int | None]:
    """The model in its format, the bytes of its weights, and the weights per scale."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from quantize.convert import memory_bytes, quantise_
    from quantize.layers import select_layers
    from quantize.schemes import find_scheme

    name, _, target_name = wanted.partition("@")
    dtype = torch.float32 if name == "float32" or device == "cpu" else torch.bfloat16
    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    config = AutoConfig.for_model("qwen3", max_position_embeddings=40960, rope_theta=1e6, **shape)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    group = None
    if name not in ("bf16", "float32"):
        scheme = find_scheme(name)
        target = scheme.find_target(target_name or next(key for key in scheme.targets if device in key))
        group = scheme.pick_group_size(options.group_size, target)
        quantise_(model, scheme, target, group, select_layers(model, scheme, group, target), None)
    if device == "cuda":
        torch.cuda.empty_cache()
        return model, torch.cuda.memory_allocated(), group
    return model, memory_bytes(model), group


if __name__ == "__main__":
    sys.exit(main())
