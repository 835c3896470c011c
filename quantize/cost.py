"""What a checkpoint costs to run here: prefill, decoding by batch size, and memory.

Server engines are faster still; the ratio of two formats on one machine is what this is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.timing import StepTimer

PROMPT = 256
"""Tokens of each prompt, and of the cache that a decoding step looks at."""
METHOD = 2
"""Of the timing: numbers of another one are not kept."""
_MIB = 1 << 20


def measure_cost(model: nn.Module, batches: Sequence[int], *, compiled: bool = True) -> dict[str, Any]:
    """Median times of a checkpoint that was loaded through transformers (see `quantize.timing`).

    Args:
        batches: sequences at a time; the prefill is measured at the first.
        compiled: compile the decoder layers, on CUDA.

    Returns:
        prompt_tokens; prefill_tokens_per_s; decode_ms: {batch: milliseconds a step, one token for each sequence};
        peak_mib: the largest memory at work (allocated on CUDA; of the whole process, its libraries included, on a CPU;
        None where the system does not tell); compiled: whether the decoder layers ran compiled; graph: whether
        a step was one CUDA graph.
    """
    device = next(model.parameters()).device
    _reset_peak(device)
    with StepTimer(model, compiled=compiled) as timer:
        prefill = timer.prefill_ms(batches[0], PROMPT)
        decode = {str(batch): timer.decode_ms(batch, PROMPT) for batch in batches}
        ran_compiled = timer.compiled
    return {
        "prompt_tokens": PROMPT,
        "prefill_tokens_per_s": 1000 * batches[0] * PROMPT / prefill,
        "decode_ms": decode,
        "peak_mib": _peak_mib(device),
        "compiled": ran_compiled,
        "graph": device.type == "cuda",
    }


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
