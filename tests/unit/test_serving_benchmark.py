"""benchmarks/serving.py with a stand-in for vLLM: what it reads of the engine, and its ratios. Speed is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serving.py"
STAND_IN = """
import json, os, sys, time
from pathlib import Path
__version__ = "0.0"
clock = [0.0]
time.perf_counter = lambda: clock[0]  # what generating takes is said, not waited for
class SamplingParams:
    def __init__(self, **settings): self.settings = settings
class LLM:
    def __init__(self, folder, profiler_config, **options):
        if folder.endswith("broken"): raise ValueError("no such layer")
        self.seconds, self.profiles = float(Path(folder).name), Path(profiler_config["torch_profiler_dir"])
        print("INFO Model loading took 1.25 GiB memory and 2.0 seconds", file=sys.stderr)
        print("INFO GPU KV cache size: 12,345 tokens", file=sys.stderr)
        print("INFO Using FLASH_ATTN attention backend out of 3", file=sys.stderr)
    def generate(self, prompts, settings, use_tqdm):
        assert {len(prompt["prompt_token_ids"]) for prompt in prompts} == {4}
        assert settings.settings["ignore_eos"] and settings.settings["max_tokens"] in (8, 32)
        clock[0] += self.seconds
    def start_profile(self): pass
    def stop_profile(self):
        events = [{"cat": "kernel", "name": "product", "dur": 4000.0}, {"cat": "cpu_op", "name": "x", "dur": 9.0}]
        (self.profiles / "trace.json").write_text(json.dumps({"traceEvents": events}))
"""


def run(tmp_path: Path, *names: str) -> tuple[int, list[dict[str, object]]]:
    (tmp_path / "vllm.py").write_text(STAND_IN)
    folders = [f"{name}={tmp_path / name}" for name in names]
    options = ["--input", "4", "--output", "8", "--batches", "1", "2", "--prompts", "3", "--repeats", "2"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--folders", *folders, *options, "--scratch", str(tmp_path), "--limit", "0.3"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_what_is_read_of_the_engine_and_the_ratios(tmp_path: Path) -> None:
    code, (first, second, third) = run(tmp_path, "0.2", "0.1", "0.4")
    assert code == 0
    assert (first["weights_gib"], first["kv_tokens"], first["attention"]) == (1.25, 12345, "FLASH_ATTN")
    assert (first["kernels"], first["gpu_ms_a_step"]) == ({"product": 0.5}, 0.5)  # 4 ms over eight steps
    ratios = second["x"]
    assert ratios == {"latency_s batch 1": 2.0, "latency_s batch 2": 2.0, "throughput tokens/s": 2.0}
    assert "throughput" not in third  # each of its latencies is above the limit: taken once, and no more asked of it


def test_one_that_does_not_load_is_said_and_the_others_run(tmp_path: Path) -> None:
    code, (broken, other) = run(tmp_path, "broken", "0.01")
    assert code == 1 and "no such layer" in str(broken["failed"])
    assert "latency_s" in other
