"""How fast vLLM serves the shipped formats: latency by batch size, throughput, weights in memory, KV cache that fits.

    python benchmarks/serving.py --shape qwen3-8b --formats bf16 int4 fp8 --vllm PATH/bin/python --out serving.jsonl

Random weights in the true shape are written as a checkpoint and converted as `quantize convert` does it; vLLM loads the
folders as they are, with its defaults. Timed as `vllm bench latency` does: all requests of a batch at once, random
prompts, `ignore_eos`, no prefix cache, from the request to the last token; throughput is that of `--prompts` requests
at once. Each format is a process of its own, one after the other; ratios are against the first. After the timing a
short run is profiled: `kernels` are the ones that took most of the GPU's time in it, in milliseconds a step of decoding
at batch 1.

    python benchmarks/serving.py --folders bf16=MODEL int4=RUN/quantized --vllm PATH/bin/python   # checkpoints of yours

Options of vLLM may follow a folder (`"fp8=RUN/quantized --enforce-eager"`); those of all stand after `--`. With
`--together` all engines are loaded at once and measured one after the other, which saves minutes of a rented GPU; each
then needs a share of its memory, and the KV cache that fits is not what vLLM's defaults leave:

    python benchmarks/serving.py --formats bf16 int8 --together -- --gpu-memory-utilization 0.3 \\
        --kv-cache-memory-bytes 20G
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from step_time import SHAPES

_GO, _READY = "go\n", "ready\n"
_STEPS = 8  # of decoding that are profiled


def main() -> int:
    """Writes the checkpoints, serves one after the other, prints one line a format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int4", "fp8"], metavar="SCHEME[@TARGET]")
    parser.add_argument("--folders", nargs="+", default=[], metavar="NAME=FOLDER", help="served in place of --formats")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 256])
    parser.add_argument("--input", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5, help="of each latency, after two that do not count")
    parser.add_argument("--prompts", type=int, default=1024, help="requests of the throughput; 0 = none")
    parser.add_argument("--limit", type=float, default=20, help="a latency above so many seconds is taken once")
    parser.add_argument("--vllm", default=sys.executable, help="the Python that has vLLM (default: this one)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoints go")
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line each")
    parser.add_argument("--together", action="store_true", help="load all before the first is measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.further = words[end + 1 :]
    if options.child:
        return _measure(options)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="serving-") as place:
        asked = {name: shlex.split(words) for name, words in (each.split("=", 1) for each in options.folders)}
        names = list(asked) or options.formats
        children = {name: _Child(name, Path(place), options) for name in names}  # all import while folders are made
        made = {} if asked else _make(options, Path(place))
        loads = asked or {name: [str(made[name])] for name in names}
        return _report(options, children, loads)


def _report(options: argparse.Namespace, children: dict[str, _Child], loads: dict[str, list[str]]) -> int:
    base: dict[str, Any] = {}
    complete = True
    if options.together:
        for name, child in children.items():
            child.load(*loads[name], *options.further)
        for child in children.values():
            child.wait()
    for name, child in children.items():
        if not options.together:
            child.load(*loads[name], *options.further)
        line = child.measure()
        complete &= "failed" not in line
        base = base or line
        for key in ("latency_s", "throughput"):
            for case, value in line.get(key, {}).items():
                known = base.get(key, {}).get(case)
                ratio = None if not known else known / value if key == "latency_s" else value / known
                line.setdefault("x", {})[f"{key} {case}"] = None if ratio is None else round(ratio, 3)
        print(json.dumps(line), flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
    return 0 if complete else 1


def _make(options: argparse.Namespace, place: Path) -> dict[str, Path]:
    """A random checkpoint in bfloat16 and its conversions, each by a process of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **shape, dtype="bfloat16")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place / "bf16")
    folders = {"bf16": place / "bf16"}
    running = []
    for name in options.formats:
        if name in folders:
            continue
        scheme, _, target = name.partition("@")
        folders[name] = place / name
        command = [sys.executable, "-m", "quantize", "convert", str(place / "bf16"), "--scheme", scheme]
        command += ["--dtype", "bfloat16", "--output", str(folders[name]), *(["--target", target] if target else [])]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a conversion failed")
    return folders


class _Child:
    """vLLM's process for one format: it imports at once, and loads and measures when its turn comes."""

    def __init__(self, name: str, place: Path, options: argparse.Namespace) -> None:
        self.name, self.log, self.said = name, place / f"{name}.log", ""
        command = [options.vllm, str(Path(__file__).resolve()), "--child", name]
        for key in ("input", "output", "repeats", "prompts", "limit"):
            command += [f"--{key}", str(getattr(options, key))]
        command += ["--batches", *map(str, options.batches)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def load(self, folder: str, *options: str) -> None:
        """Names the folder, with what its format needs of vLLM, as `quantize serve` gives it, and further options."""
        self._say(json.dumps([folder, *_needed(Path(folder)), *options]) + "\n")

    def wait(self) -> None:
        """Until it is loaded, or has died."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == _READY:
                return
            self.said += line

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, and its log says why
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def measure(self) -> dict[str, Any]:
        """What it measured; {failed: why} where it died."""
        self._say(_GO)
        said = self.said + self.process.communicate()[0]
        lines = [line.removeprefix("RESULT ") for line in said.splitlines() if line.startswith("RESULT ")]
        log = self.log.read_text(encoding="utf-8", errors="replace") + said
        line: dict[str, Any] = {"format": self.name, **(json.loads(lines[-1]) if lines else {})}
        if self.process.returncode or not lines:
            errors = [each for each in log.splitlines() if "Error" in each]
            line["failed"] = (errors or log.splitlines() or ["it said nothing"])[-1][-300:]
            print(log[-4000:], file=sys.stderr)
        for key, read, pattern in (
            ("weights_gib", float, r"Model loading took ([\d.]+) GiB"),
            ("kv_tokens", _count, r"GPU KV cache size: ([\d,]+) tokens"),
            ("attention", str, r"Using (\S+) attention backend"),
        ):
            found = re.search(pattern, log)
            line[key] = None if found is None else read(found[1])
        return line


def _needed(folder: Path) -> tuple[str, ...]:
    """The options of vLLM without which it does not run a checkpoint's format."""
    from quantize.files import read_mapping
    from quantize.serving.check import find_format, needed_arguments
    from quantize.serving.layout import read_weights

    settings = read_mapping(folder / "config.json")
    target = find_format(folder, read_weights(folder))[1] if settings.get("quantization_config") else None
    return needed_arguments(settings, target)


def _count(text: str) -> int:
    """Of `812,176`."""
    return int(text.replace(",", ""))


def _measure(options: argparse.Namespace) -> int:
    """In vLLM's Python: loads the folder that stdin names, and measures it."""
    import numpy as np
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    asked = json.loads(sys.stdin.readline())
    began = time.perf_counter()
    profiles = tempfile.mkdtemp()
    profiler = {
        "profiler": "torch", "torch_profiler_dir": profiles, "torch_profiler_with_stack": False,
        "ignore_frontend": True, "delay_iterations": 2, "max_iterations": _STEPS,  # the prompt is not profiled
    }  # fmt: skip
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options_of_vllm = ["--skip-tokenizer-init", "--no-enable-prefix-caching", "--profiler-config", json.dumps(profiler)]
    read = parser.parse_args(["--model", asked[0], *options_of_vllm, *asked[1:]])
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(read))
    start = round(time.perf_counter() - began, 1)
    print(_READY, end="", flush=True)
    assert sys.stdin.readline() == _GO
    line: dict[str, Any] = {"vllm": vllm.__version__, "start_s": start}
    draw = np.random.default_rng(0)

    def generate(requests: int, tokens: int) -> float:
        prompts = draw.integers(0, 10000, (requests, options.input)).tolist()
        settings = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=tokens, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        return time.perf_counter() - start

    line["latency_s"], line["spread_s"] = {}, {}
    for batch in options.batches:
        seconds = _repeated(lambda batch=batch: generate(batch, options.output), options)  # type: ignore[misc]
        line["latency_s"][f"batch {batch}"] = round(statistics.median(seconds), 4)
        line["spread_s"][f"batch {batch}"] = [round(min(seconds), 4), round(max(seconds), 4)]
        print("RESULT", json.dumps(line), flush=True)  # what is known, should the rest take too long
    if options.prompts and max(line["latency_s"].values()) <= options.limit:
        taken = generate(options.prompts, options.output)
        tokens = options.prompts * (options.input + options.output)
        line["throughput"] = {"tokens/s": round(tokens / taken)}
        print("RESULT", json.dumps(line), flush=True)
    llm.start_profile()
    generate(1, 4 * _STEPS)
    llm.stop_profile()
    line["kernels"], line["gpu_ms_a_step"] = _kernels(Path(profiles))
    print("RESULT", json.dumps(line), flush=True)
    return 0


def _repeated(work: Callable[[], float], options: argparse.Namespace) -> list[float]:
    first = work()
    if first > options.limit:
        return [first]
    work()
    return [work() for _ in range(options.repeats)]


def _kernels(folder: Path) -> tuple[dict[str, float], float]:
    """Milliseconds a decoding step by kernel, the eight that took most; and of all together."""
    total: dict[str, float] = {}
    for path in folder.rglob("*.json*"):
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as stream:
            events = json.load(stream).get("traceEvents", [])
        for event in events:
            if event.get("cat") == "kernel":
                name = event["name"][:110]
                total[name] = total.get(name, 0.0) + event["dur"] / 1000 / _STEPS
    most = sorted(total.items(), key=lambda each: -each[1])[:8]
    return {name: round(each, 4) for name, each in most}, round(sum(total.values()), 4)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    sys.exit(main())
