"""What a checkpoint costs to run here: prefill, decoding by batch size, and memory, through transformers' `generate`.

It is the way that a user of transformers takes: greedy, the cache of a fixed size, and on CUDA the forward pass
compiled into one CUDA graph. Server engines are faster; the ratio of two formats on one machine is what this is for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

PROMPT = 256
"""Tokens of each prompt."""
_CALLS = {"cuda": (2, 3, 32), "cpu": (1, 2, 12)}
"""By device: calls that compile and record and are not counted, calls that are, and tokens generated in each, of which
the first belongs to the prefill."""
_MIB = 1 << 20


def measure_cost(model: nn.Module, batches: Sequence[int]) -> dict[str, Any]:
    """Median times of a checkpoint that was loaded through transformers, on random prompts of `PROMPT` tokens.

    Args:
        batches: sequences at a time; the prefill is measured at the first.

    Returns:
        prompt_tokens; prefill_tokens_per_s; decode_ms: {batch: milliseconds a step, one token for each sequence};
        peak_mib: the largest memory at work (allocated on CUDA; of the whole process, its libraries included, on a CPU;
        None where the system does not tell); compiled: whether decoding ran compiled.
    """
    device = next(model.parameters()).device
    _reset_peak(device)
    prefill: float | None = None
    decode: dict[str, float] = {}
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        config: Any = model.config
        ids = torch.randint(0, config.get_text_config().vocab_size, (batch, PROMPT), generator=generator).to(device)
        first, step = _seconds(model, ids)
        decode[str(batch)] = 1000 * step
        prefill = prefill or batch * PROMPT / first
    return {
        "prompt_tokens": PROMPT,
        "prefill_tokens_per_s": prefill,
        "decode_ms": decode,
        "peak_mib": _peak_mib(device),
        "compiled": device.type == "cuda",
    }


class _Clock(BaseStreamer):
    """Notes when `generate` hands out each token, which it does once the token is on the CPU."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each token of the batch."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to write."""


def _seconds(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Median seconds of the prefill, and of a decoding step; the first calls compile and record, and do not count."""
    warm, counted, new = _CALLS["cuda" if ids.is_cuda else "cpu"]
    settings: dict[str, Any] = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(ids), "cache_implementation": "static"}
    prefills, steps = [], []
    for call in range(warm + counted):
        clock = _Clock()
        model.generate(ids, streamer=clock, **settings)
        prompt, first, *others = clock.times
        if call < warm:
            continue
        prefills.append(first - prompt)
        steps += [after - before for before, after in zip([first, *others], others, strict=False)]
    return statistics.median(prefills), statistics.median(steps)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the process's peak (proc(5))
    except OSError:
        return


def _peak_mib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / _MIB
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) / 1024 if found else None
