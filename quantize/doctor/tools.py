"""What runs beside training: trackers, benchmarks, sweeps, and the hub. Of a secret, only whether it is there."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from quantize.doctor.findings import Finding, python
from quantize.doctor.packages import extra_command, version_of

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def describe_tools() -> Iterator[Finding]:
    """wandb, lm-eval, optuna, the hub's token and offline switches."""
    yield _wandb()
    for name, package, extra, purpose in (
        ("lm-eval", "lm-eval", "eval", "benchmarks (eval.tasks)"),
        ("optuna", "optuna", "sweep", "searches over settings"),
    ):
        found = version_of(package)
        if found is None:
            yield Finding(name, "no", f"not installed: {purpose}", extra_command(extra))
        else:
            yield Finding(name, "yes", f"{found}: {purpose}")
    yield _token()
    offline = [name for name in _OFFLINE if os.environ.get(name, "").upper() in _TRUE]
    if offline:
        text = f"{' and '.join(offline)} set: only what is on this disk is used, nothing is downloaded or pushed"
        yield Finding("hub offline", "fact", text, f"unset {' '.join(offline)}")
    if os.environ.get("HF_ENDPOINT"):
        yield Finding("hub address", "fact", "HF_ENDPOINT is set: another hub than the usual one is asked")


def _wandb() -> Finding:
    found = version_of("wandb")
    if found is None:
        return Finding("wandb", "no", "not installed: curves and reports (track.wandb)", extra_command("wandb"))
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in ("offline", "disabled"):
        return Finding("wandb", "yes", f"{found}; WANDB_MODE={mode} is set, so nothing is sent")
    if os.environ.get("WANDB_API_KEY") or _in_netrc():
        return Finding("wandb", "yes", f"{found}, logged in: track.wandb=online")
    text = f"{found}, not logged in: track.wandb=offline works, online does not"
    return Finding("wandb", "no", text, f"{python()} -m wandb login")


def _in_netrc() -> bool:
    """Whether W&B's machine has an entry in the file where `wandb login` writes it."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        with suppress(OSError, UnicodeDecodeError, netrc.NetrcParseError):
            if netrc.netrc(str(path.expanduser())).authenticators(host):
                return True
    return False


def _token() -> Finding:
    """Whether there is one; it is neither shown nor sent."""
    named = next((name for name in _TOKENS if os.environ.get(name, "").strip()), None)
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    if named:
        return Finding("hub token", "yes", f"in {named}; whether the hub takes it was not asked")
    if path.is_file() and path.stat().st_size:
        return Finding("hub token", "yes", "from `hf auth login`; whether the hub takes it was not asked")
    return Finding("hub token", "no", "none: gated models, and `quantize push`, need one", "hf auth login")
