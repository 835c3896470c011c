"""This machine without torch: system, Python, processor, memory, disk, and what the NVIDIA driver says."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quantize.doctor.findings import Finding, look, tilde
from quantize.hardware import has_nvidia_driver

_GIB = 2**30
_QUERY = ("name", "compute_cap", "memory.total", "driver_version")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni")
_CGROUP = Path("/sys/fs/cgroup")
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi names it.

    Attributes:
        capability: compute capability, as "9.0". memory_gib: of the card. driver: the driver's version, as "580.95.05".
    """

    name: str
    capability: str
    memory_gib: float
    driver: str


def describe_machine(root: Path, gpus: list[Gpu]) -> list[Finding]:
    """The section on this machine.

    Args:
        root: where runs go.
        gpus: what `find_gpus` gave.
    """
    probes = {
        "system": _system, "Python": _python, "processor": _processor, "memory": _memory,
        "disk": lambda: _disk(root), "GPU": lambda: _gpus(gpus),
    }  # fmt: skip
    return [finding for name, probe in probes.items() for finding in look(name, probe)]


def find_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; empty where there is none, or no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = [command, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != len(_QUERY):  # a message in place of a card
            continue
        name, capability, memory, driver = parts
        found.append(Gpu(name, capability, float(memory) / 1024 if memory.replace(".", "").isdigit() else 0.0, driver))
    return found


def _system() -> Iterator[Finding]:
    words = [platform.system(), platform.release(), platform.machine()]
    with suppress(OSError):
        words.append(f"({platform.freedesktop_os_release()['PRETTY_NAME']})")
    if Path("/.dockerenv").exists():
        words.append("in a container")
    yield Finding("system", "fact", " ".join(words))


def _python() -> Iterator[Finding]:
    text = f"{platform.python_version()}, {tilde(sys.executable)}"
    if sys.version_info[:2] >= OLDEST_PYTHON:
        yield Finding("Python", "fact", text)
        return
    oldest = ".".join(map(str, OLDEST_PYTHON))
    command = f"python{oldest} -m venv .venv && .venv/bin/python -m pip install ."
    yield Finding("Python", "broken", f"{text}; ongrid needs {oldest} or newer", command)


def _processor() -> Iterator[Finding]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="utf-8").split()
        usable = min(usable, max(1, round(int(quota) / int(period))))
    known = [word for word in _FLAGS if word in flags]
    yield Finding("processor", "fact", f"{name}, {usable} usable core(s)" + (f", {' '.join(known)}" if known else ""))
    if flags and platform.machine() == "x86_64" and not flags & {"avx512_vnni", "avx_vnni"}:
        yield Finding(
            "processor", "fact", "without VNNI torch's int8 kernel saturates: int8-int8 computes other numbers here "
            "than it was trained for; every other format is unaffected",
        )  # fmt: skip


def _memory() -> Iterator[Finding]:
    known = {}
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            known[name] = int(value.split()[0]) * 1024
    total = known.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{total / _GIB:.1f} GiB"
    if "MemAvailable" in known:
        text += f", {known['MemAvailable'] / _GIB:.1f} available"
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int((_CGROUP / "memory.max").read_text(encoding="utf-8"))
        if limit < total:
            text += f"; this container may use {limit / _GIB:.1f}"
    yield Finding("memory", "fact", text)


def _disk(root: Path) -> Iterator[Finding]:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    places = {"runs go to": root, "the hub's downloads to": Path(os.environ.get("HF_HUB_CACHE") or home / "hub")}
    for what, place in places.items():
        folder = place.expanduser().absolute()
        there = next(each for each in (folder, *folder.parents) if each.exists())
        free = shutil.disk_usage(there).free / _GIB
        text = f"{what} {tilde(folder)}, {free:.1f} GiB free"
        if there.is_dir() and os.access(there, os.W_OK):
            yield Finding("disk", "fact", text)
        else:
            reason = "cannot be written" if there.is_dir() else "is a file"
            remedy = "" if what != "runs go to" else "train --config tiny.yaml --qat int8-int4 --run.root=~/runs"
            yield Finding("disk", "broken", f"{text}; {tilde(there)} {reason}", remedy)


def _gpus(gpus: list[Gpu]) -> Iterator[Finding]:
    for gpu in gpus:
        text = f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_gib:.1f} GiB, driver {gpu.driver}"
        yield Finding("GPU", "fact", text)
    if gpus:
        yield from _compiler()
    elif has_nvidia_driver():
        yield Finding("GPU", "broken", "an NVIDIA driver is loaded, but nvidia-smi lists no GPU", "nvidia-smi")
    else:
        yield Finding("GPU", "fact", "none, or no NVIDIA driver: everything runs on the processor")


def _compiler() -> Iterator[Finding]:
    """Triton builds a launcher in C when a kernel first runs."""
    names = [os.environ.get("CC") or "", "gcc", "clang", "cc"]
    compiler = next((name for name in names if name and shutil.which(name)), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    lacking = [] if compiler else ["a C compiler"]
    lacking += [] if headers.exists() else [f"Python's headers ({headers})"]
    if lacking:
        text = f"{' and '.join(lacking)} missing: Triton's kernels do not start without"
        yield Finding("compiler", "broken", text, f"apt-get install -y gcc python{version}-dev")
    else:
        yield Finding("compiler", "fact", f"{compiler}, with Python's headers: what Triton's kernels need to start")
