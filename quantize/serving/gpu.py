"""The GPU that vLLM will take: the first that CUDA_VISIBLE_DEVICES leaves, and how much of its memory is free.

Numbers in that variable count as nvidia-smi does, as vLLM is started with CUDA_DEVICE_ORDER=PCI_BUS_ID.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.doctor import machine
from quantize.errors import UserError
from quantize.files import read_mapping
from quantize.hardware import has_nvidia_driver

if TYPE_CHECKING:
    from quantize.schemes import Scheme, Target
    from quantize.serving.check import Served
    from quantize.serving.environment import Vllm

_OLDEST = (7, 5)
"""Compute capability that vLLM wants for any of torchao's formats."""
BFLOAT16 = (8, 0)
"""Compute capability from which vLLM computes in bfloat16."""
_SHARE = 0.9
SCORED_TOKENS = 2048
"""Tokens that the engine computes at a time."""
_KEPT_GIB = 1.75
"""GPU memory that the engine leaves alone, beside what scored prompts need: it takes its share at the start."""
_VOCABULARY = 150_000
"""Where config.json names none."""


def visible() -> str | None:
    """The first of CUDA_VISIBLE_DEVICES: a number, or a name ("GPU-...", "MIG-..."); "" = it hides all, None = it is
    not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return None
    first = named.split(",")[0].strip()
    return "" if first.startswith("-") else first


def find_gpu() -> machine.Gpu | None:
    """The GPU that vLLM will take; None = there is none, or CUDA_VISIBLE_DEVICES leaves none."""
    first, found = visible(), machine.find_gpus()
    if not found or first == "":
        return None
    if first is None:
        return found[0]
    number = _number_of(first)
    return found[number] if number is not None and number < len(found) else None


def _number_of(name: str) -> int | None:
    """The number of a GPU by an entry of CUDA_VISIBLE_DEVICES: the number itself, or the beginning of its name."""
    if name.isdigit():
        return int(name)
    whole = [line for line in _ask("-L").splitlines() if line.startswith("GPU ")]  # parts of one (MIG) are indented
    return next((number for number, line in enumerate(whole) if f"UUID: {name}" in line), None)


def by_numbers() -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES as vLLM can read it, for its environment: of a name it says that it is no number.

    Raises:
        UserError: a name is none of a whole GPU of this machine.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    words = [word.strip() for word in named.split(",")]
    if not visible() or all(word.isdigit() for word in words):
        return {}
    numbers = [_number_of(word) for word in words]
    if None in numbers:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={named}: vLLM takes numbers of GPUs there, and {words[numbers.index(None)]} is the "
            "name of none that nvidia-smi -L lists (a part of one, MIG, has no number of its own): give numbers"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _ask(*words: str) -> str:
    """What nvidia-smi says; nothing where there is none, or it fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        done = subprocess.run([command, *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def look_at_gpu(served: Served, vllm: Vllm | None = None) -> None:
    """Whether this machine's GPU has what a folder needs, and its driver what vLLM's environment needs.

    Raises:
        UserError: it has not, or there is no GPU.
    """
    gpu = find_gpu()
    if gpu is None:
        by_numbers()
        if visible() is not None and machine.find_gpus():
            why = f"; CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} leaves none of this machine's"
        else:
            why = "; an NVIDIA driver is loaded, but nvidia-smi lists no GPU" if has_nvidia_driver() else ""
        raise UserError(
            f"vLLM needs an NVIDIA GPU, and this machine has none{why}; print the command for another machine with: "
            f"quantize serve {served.folder} --dry-run"
        )
    check_gpu(served, gpu)
    if vllm is not None:
        check_driver(vllm, gpu.driver)


def check_gpu(served: Served, gpu: machine.Gpu) -> None:
    """Raises UserError where a GPU is older than a folder's format needs, as far as both are known."""
    if served.scheme is not None and served.target is not None:
        refuse_old(gpu, str(served.folder), served.scheme, served.target, served.dtype)


def refuse_old(gpu: machine.Gpu, what: str, scheme: Scheme, target: Target, dtype: str) -> None:
    """Raises UserError where a GPU has not what a format needs.

    Args:
        what: is in that format, in words. dtype: what it computes in; "" = not known.
    """
    from quantize.schemes import served_formats

    here = capability_of(gpu)
    if here is None:
        return
    needed, what = _needed(target), f"{what} is {scheme.name} for {target.name}"
    if here < needed:
        able = [
            f"{other.name} for {place.name}"
            for other, place in served_formats()
            if "mslk" not in place.needs and here >= _needed(place)
        ]
        raise UserError(
            f"{what}, which needs compute capability {'.'.join(map(str, needed))} or newer, and {gpu.name} has "
            f"{gpu.capability}: serve it on a newer GPU"
            + (f", or convert the 16-bit weights to {' or '.join(able)}" if able else "")
        )
    if here < BFLOAT16 and dtype == "bfloat16":
        raise UserError(
            f"{what} in bfloat16, which vLLM computes in from compute capability {'.'.join(map(str, BFLOAT16))} on, "
            f"and {gpu.name} has {gpu.capability}: serve it on a newer GPU, or convert the 16-bit weights again with "
            "--dtype float16"
        )


def capability_of(gpu: machine.Gpu) -> tuple[int, ...] | None:
    """Compute capability, as (9, 0); None where nvidia-smi does not know it."""
    return _parts(gpu.capability) if re.fullmatch(r"\d+\.\d+", gpu.capability) else None


def _needed(target: Target) -> tuple[int, ...]:
    """The compute capability that a format needs in vLLM."""
    asked = (need.partition(">=") for need in target.needs)
    return max(_OLDEST, *(_parts(version) for name, _, version in asked if name == "cuda"))


def _parts(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def check_driver(vllm: Vllm, driver: str) -> None:
    """Whether the driver is new enough for the CUDA of vLLM's environment.

    Args:
        driver: its version, as "580.95.05".

    Raises:
        UserError: it is older, and NVIDIA's compatibility package is not in use.
    """
    needed, major = vllm.driver, driver.partition(".")[0]
    if os.environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "0") != "0" or "compat" in os.environ.get(
        "LD_LIBRARY_PATH", ""
    ):
        return
    if needed is not None and major.isdigit() and int(major) < needed:
        raise UserError(
            f"the NVIDIA driver is {driver}, and {vllm.executable} is built for CUDA {vllm.cuda}, which needs "
            f"{needed} or newer: update the driver"
        )


def memory_share(folder: Path) -> list[str]:
    """The option for the share of the GPU that is free now, as another process may hold some; nothing where nvidia-smi
    tells none.

    Raises:
        UserError: hardly any is free.
    """
    number = _number_of(visible() or "0")
    said = _ask("--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits", "-i", str(number))
    try:
        free, total = (float(part) / 1024 for part in said.splitlines()[0].split(","))
    except (ValueError, IndexError):
        return []
    # The logits of scored prompts come on top of what the engine counts, in float32, twice.
    kept = _KEPT_GIB + SCORED_TOKENS * _vocabulary(folder) * 4 * 2 / 2**30
    share = min(_SHARE, (free - kept) / total)
    if share < 0.05:
        raise UserError(
            f"the GPU has {free:.1f} of {total:.1f} GiB free, too little for vLLM; end what holds the rest: nvidia-smi"
        )
    return ["--gpu-memory-utilization", f"{share:.3f}"]


def _vocabulary(folder: Path) -> int:
    path = folder / "config.json"
    settings: dict[str, Any] = read_mapping(path) if path.is_file() else {}
    found = settings.get("vocab_size") or (settings.get("text_config") or {}).get("vocab_size")
    return found if isinstance(found, int) else _VOCABULARY
