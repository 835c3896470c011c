"""Provenance of a run: source, packages, machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "ongrid", "torch", "torchao", "transformers", "peft", "trl", "datasets", "accelerate", "unsloth", "unsloth_zoo",
    "triton", "bitsandbytes", "mslk-cuda", "lm_eval", "wandb",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    """git, packages, python and device, as the manifest stores them."""
    from quantize.hardware import describe_device, installed

    return {
        "git": _git(),
        "packages": installed(_PACKAGES),
        "python": platform.python_version(),
        "device": describe_device(),
    }


def _git() -> dict[str, Any] | None:
    project = Path(__file__).resolve().parent.parent
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"sha": sha.stdout.strip(), "dirty": bool(changed.stdout.strip())}
