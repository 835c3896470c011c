"""benchmarks/serving.py with a stand-in for vLLM: what it reads of the engine, and its ratios. Speed is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantize.schemes import find_scheme

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serving.py"
STAND_IN = """
import json, os, sys, time
from pathlib import Path
__version__ = "0.0"
clock = [0.0]
time.perf_counter = lambda: clock[0]  # what generating takes is said, not waited for
class SamplingParams:
    def __init__(self, **settings): self.settings = settings
def note(word):
    with open(os.environ["NOTES"], "a") as stream: stream.write(word + "\\n")
class LLM:
    @classmethod
    def from_engine_args(cls, asked): return cls(asked)
    def __init__(self, asked):
        if asked.model.endswith("broken"): raise ValueError("no such layer")
        self.name, self.seconds = Path(asked.model).name, float(Path(asked.model).name)
        self.profiles = Path(json.loads(asked.profiler_config)["torch_profiler_dir"])
        note(f"{self.name} loads {asked.dtype} {asked.cudagraph_capture_sizes} {asked.kv_cache_memory_bytes}")
        print("INFO Model loading took 1.25 GiB memory and 2.0 seconds")
        print("INFO GPU KV cache size: 12,345 tokens")
        print("INFO Using FLASH_ATTN attention backend out of 3", file=sys.stderr)
    def generate(self, prompts, settings, use_tqdm):
        assert {len(prompt["prompt_token_ids"]) for prompt in prompts} == {4}
        assert settings.settings["ignore_eos"] and settings.settings["max_tokens"] in (8, 32)
        clock[0] += self.seconds
    def start_profile(self): note(f"{self.name} is done")
    def stop_profile(self):
        events = [{"cat": "kernel", "name": "product", "dur": 4000.0}, {"cat": "cpu_op", "name": "x", "dur": 9.0}]
        (self.profiles / "trace.json").write_text(json.dumps({"traceEvents": events}))
"""
ARGUMENTS = """
class EngineArgs:
    @staticmethod
    def add_cli_args(parser):
        for name in ("model", "profiler-config", "dtype", "kv-cache-memory-bytes"): parser.add_argument(f"--{name}")
        for name in ("skip-tokenizer-init", "no-enable-prefix-caching"):
            parser.add_argument(f"--{name}", action="store_true", required=True)
        parser.add_argument("--cudagraph-capture-sizes", nargs="+", type=int)
        return parser
    @staticmethod
    def from_cli_args(read): return read
"""


def run(tmp_path: Path, *names: str, further: Sequence[str] = ()) -> tuple[int, list[dict[str, object]], list[str]]:
    files = {"__init__": STAND_IN, "engine/__init__": "", "engine/arg_utils": ARGUMENTS, "utils/__init__": ""}
    files["utils/argparse_utils"] = "from argparse import ArgumentParser as FlexibleArgumentParser"
    for name, text in files.items():
        path = tmp_path / "packages" / "vllm" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in (each.split()[0] for each in names):
        (tmp_path / name).mkdir(exist_ok=True)
        if not (tmp_path / name / "config.json").exists():
            (tmp_path / name / "config.json").write_text('{"dtype": "bfloat16"}')
    folders = [f"{name.split()[0]}={tmp_path / name}" for name in names]
    options = ["--input", "4", "--output", "8", "--batches", "1", "2", "--prompts", "3", "--repeats", "2"]
    options += ["--scratch", str(tmp_path), "--limit", "0.3", *further]
    paths = os.pathsep.join([str(tmp_path / "packages"), str(SCRIPT.parents[1])])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--folders", *folders, *options], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths, "NOTES": str(tmp_path / "notes")},
    )  # fmt: skip
    notes = tmp_path / "notes"
    said = notes.read_text().splitlines() if notes.exists() else []
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], said


def test_what_is_read_of_the_engine_and_the_ratios(tmp_path: Path) -> None:
    code, (first, second, third), notes = run(tmp_path, "0.2", "0.1", "0.4")
    assert code == 0
    assert (first["weights_gib"], first["kv_tokens"], first["attention"]) == (1.25, 12345, "FLASH_ATTN")
    assert (first["kernels"], first["gpu_ms_a_step"]) == ({"product": 0.5}, 0.5)  # 4 ms over eight steps
    ratios = second["x"]
    assert ratios == {"latency_s batch 1": 2.0, "latency_s batch 2": 2.0, "throughput tokens/s": 2.0}
    assert "throughput" not in third  # each of its latencies is above the limit: taken once, and no more asked of it
    loads = [f"{name} loads None None None" for name in ("0.2", "0.1", "0.4")]
    assert notes == [loads[0], "0.2 is done", loads[1], "0.1 is done", loads[2], "0.4 is done"]


def test_one_that_does_not_load_is_said_and_the_others_run(tmp_path: Path) -> None:
    for further in ((), ("--together",)):
        code, (broken, other), _ = run(tmp_path, "broken", "0.01", further=further)
        assert code == 1 and "no such layer" in str(broken["failed"])
        assert "latency_s" in other


def test_together_all_load_before_one_is_measured_each_with_what_its_format_needs(tmp_path: Path) -> None:
    (tmp_path / "0.1").mkdir()
    settings = {"dtype": "bfloat16", "quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "0.1" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "0.1" / "ongrid.json").write_text(json.dumps({"scheme": "int8-int8", "target": "cuda"}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "0.1" / "model.safetensors")
    further = ("--together", "--", "--kv-cache-memory-bytes", "2G")
    code, (first, second), notes = run(tmp_path, "0.2 --dtype float16", "0.1", further=further)
    assert code == 0
    assert (first["kv_tokens"], second["weights_gib"]) == (12345, 1.25)
    sizes = find_scheme("int8-int8").find_target("cuda").vllm_arguments[1:]
    assert sorted(notes[:2]) == [f"0.1 loads bfloat16 [{', '.join(sizes)}] 2G", "0.2 loads float16 None 2G"]
    assert notes[2:] == ["0.2 is done", "0.1 is done"]
