"""What this machine can run, told as reasons rather than booleans. Imports torch only when asked."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantize.schemes import Scheme, Target


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA GPU may be used here, as far as can be told without torch; /dev/dxg is that of WSL."""
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg"))


def missing_for(target: Target) -> list[str]:
    """What this machine lacks to run `target`; an empty list means that it runs."""
    return [reason for need in target.needs if (reason := _missing(need))]


def _missing(need: str) -> str | None:
    name, _, wanted = need.partition(">=")
    if name == "mslk":
        import importlib.util

        found = importlib.util.find_spec("mslk") is not None
        return None if found else "the package mslk (pip install mslk-cuda)"
    if name != "cuda":
        raise AssertionError(f"unknown requirement {need!r} in quantize/schemes.py")
    import torch

    if torch.version.cuda is None:
        return (
            f"a CUDA GPU of compute capability {wanted} or newer (torch {torch.__version__} is built without CUDA; "
            "where there is a GPU: make setup LOCK=requirements/cuda-py312.txt)"
        )
    if not torch.cuda.is_available():
        return f"a CUDA GPU of compute capability {wanted} or newer (this machine has none)"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < tuple(int(part) for part in wanted.split(".")):
        return f"compute capability {wanted} or newer ({torch.cuda.get_device_name()} has {major}.{minor})"
    return None


def describe_device() -> str:
    """The machine in words: GPU, or processor and threads."""
    import platform

    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe_here(dtype: str) -> dict[str, Any]:
    """What else than the weights decides a measurement: device, dtype, packages, and the version of our numerics."""
    from importlib.metadata import version

    from quantize.numerics import VERSION

    packages = {name: version(name) for name in ("torch", "torchao", "transformers")}
    return {"device": describe_device(), "dtype": dtype, "packages": packages | {"numerics": str(VERSION)}}


def pick_target(scheme: Scheme, asked: str | None) -> tuple[Target, list[str]]:
    """The target to ship for, and what this machine lacks to run it.

    Without a wish: the last of the scheme's targets that runs here (an accelerator before the CPU), else its first.

    Raises:
        UserError: `asked` is not a target of `scheme`.
    """
    lacking = {target.name: missing_for(target) for target in scheme.eligible(asked)}
    runnable = [name for name, reasons in lacking.items() if not reasons]
    chosen = runnable[-1] if runnable else next(iter(lacking))
    return scheme.targets[chosen], lacking[chosen]
