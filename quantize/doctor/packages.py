"""Versions against what the project asks for, and the builds that do not go together."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from quantize.doctor.findings import PROJECT, Finding, lock_of, pip, tilde
from quantize.doctor.machine import Gpu

_SHOWN = ("torch", "torchao", "transformers", "peft", "trl")
_DRIVERS: Mapping[int, str] = {12: "525.60", 13: "580.65"}
"""Major version of CUDA -> the oldest driver that runs its builds."""
_EXTENSIONS = "no format here computes with torchao's own extensions: the layers run on torch's kernels, or on mslk's"


@dataclass(frozen=True)
class Need:
    """One requirement of the project.

    Attributes:
        name: of the package. text: without its marker, as pip takes it. found: the version that is installed.
        fits: whether that is in range; None where it cannot be told.
    """

    name: str
    text: str
    found: str | None
    fits: bool | None


def version_of(name: str) -> str | None:
    """The installed version; None without."""
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError, OSError):  # not there, or what describes it is damaged
        return None


@cache
def asked(extra: str | None = None) -> tuple[str, ...]:
    """What the project asks for: its dependencies, or those of an extra.

    From its metadata, else, where it is not installed, from pyproject.toml.
    """
    try:
        lines = metadata.requires("ongrid") or []
    except metadata.PackageNotFoundError:
        lines = None
    if lines is not None:
        marks = {line: re.search(r"extra\s*==\s*[\"']([^\"']+)", line) for line in lines}
        return tuple(line.partition(";")[0].strip() for line, mark in marks.items() if (mark and mark[1]) == extra)
    import tomllib

    path = PROJECT / "pyproject.toml"
    if not path.is_file():
        return ()
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return tuple(project["dependencies"] if extra is None else project["optional-dependencies"][extra])


def check(text: str) -> Need:
    """One requirement against what is installed."""
    named = re.match(r"[\w.-]+", text)
    assert named is not None, text
    found = version_of(named[0])
    try:
        from packaging.requirements import Requirement

        fits = found is not None and Requirement(text).specifier.contains(found, prereleases=True)
    except ImportError:
        return Need(named[0], text, found, None if found else False)
    return Need(named[0], text, found, fits)


def wanted_text(name: str) -> str:
    """What the project asks of one of its packages, as pip takes it; the name alone where it asks nothing."""
    return next((text for text in asked() if re.split(r"[^\w.-]", text, maxsplit=1)[0] == name), name)


def extra_command(extra: str) -> str:
    """The command that installs an extra's packages."""
    return pip(*asked(extra))


def core() -> list[Need]:
    """The packages without which nothing works."""
    return [check(text) for text in asked()]


def describe_packages(answers: Mapping[str, Any], gpus: list[Gpu]) -> Iterator[Finding]:
    """The section on packages.

    Args:
        answers: of `child.ask("torch")`.
        gpus: what nvidia-smi lists.
    """
    needs = core()
    found = version_of("ongrid")
    if found is None:
        text = "not installed, so `train` and `quantize` are no commands (python -m train, python -m quantize are)"
        yield Finding("ongrid", "no", text, pip(".", options="--no-deps --no-build-isolation --editable"))
    else:
        yield Finding("ongrid", "yes", found)
    yield from _versions(needs)
    yield from _torch_build(answers, gpus)
    yield from _torchao(answers)


def _versions(needs: list[Need]) -> Iterator[Finding]:
    missing = [need for need in needs if need.found is None]
    outside = [need for need in needs if need.found is not None and need.fits is False]
    shown = [need for need in needs if need.name in _SHOWN and need not in missing and need not in outside]
    for need in shown:
        unsure = "; its range cannot be checked without the package packaging" if need.fits is None else ""
        yield Finding(need.name, "yes", f"{need.found} ({need.text}){unsure}")
    if missing:
        names = ", ".join(need.name for need in missing)
        yield Finding("missing", "broken", f"needed and not installed: {names}", pip(*(need.text for need in missing)))
    for need in outside:
        text = f"{need.found} is outside what is tested, {need.text}: numbers or names may have changed"
        yield Finding(need.name, "no", text, pip(need.text))
    rest = len(needs) - len(shown) - len(missing) - len(outside)
    if rest:
        yield Finding("the rest", "yes", f"{rest} more packages that ongrid needs are installed, in range")


def _torch_build(answers: Mapping[str, Any], gpus: list[Gpu]) -> Iterator[Finding]:
    known = answers.get("torch")
    if known is None:
        if version_of("torch"):
            reason = answers.get("failed", "no message")
            wanted = wanted_text("torch")
            text = f"installed, but cannot be imported: {reason}"
            yield Finding("import torch", "broken", text, pip(wanted, options="--force-reinstall"))
        return
    cuda, sees = known["cuda"], known["available"]
    if known.get("hip"):
        yield Finding("torch's build", "fact", f"ROCm {known['hip']}: nothing of this project was ever run on it")
    elif cuda is None and gpus:
        text = f"torch {known['version']} is built without CUDA and leaves the {gpus[0].name} unused"
        yield Finding("torch's build", "broken", text, cuda_command())
    elif cuda is None:
        yield Finding("torch's build", "fact", "for the processor, as fits a machine without a GPU")
    elif sees:
        yield Finding("torch's build", "yes", f"CUDA {cuda}, and torch sees the GPU")
    elif gpus:
        oldest = _DRIVERS.get(int(cuda.partition(".")[0]))
        text = f"CUDA {cuda}, but torch cannot use the {gpus[0].name}: {answers.get('no_gpu', 'no reason given')}"
        text += f" (driver {gpus[0].driver}; builds of CUDA {cuda} need {oldest} or newer)" if oldest else ""
        yield Finding("torch's build", "broken", text, _driver_command(oldest))
    else:
        text = f"CUDA {cuda}, on a machine without a GPU: it works, on the processor, and takes some GiB more disk"
        yield Finding("torch's build", "fact", text)
    for device in answers.get("devices", ()):
        if device["computes"] is not None:
            text = f"{device['name']} ({device['capability']}) does not compute: {device['computes']}"
            yield Finding("torch's build", "broken", text, cuda_command())


def cuda_command() -> str:
    """The command that brings the packages of a GPU: a second environment of a checkout, else torch's own build."""
    lock = lock_of("cuda")
    if lock is not None and (PROJECT / "Makefile").is_file():
        return f"make -C {tilde(PROJECT)} setup VENV=.venv-cuda LOCK=requirements/{lock.name}"
    return pip(wanted_text("torch"), options="--force-reinstall")


def _driver_command(oldest: str | None) -> str:
    """Where the distribution has one command for a newer driver."""
    try:
        ubuntu = platform.freedesktop_os_release().get("ID") == "ubuntu"
    except OSError:
        ubuntu = False
    return "sudo ubuntu-drivers install" if ubuntu and oldest else "nvidia-smi"


def _torchao(answers: Mapping[str, Any]) -> Iterator[Finding]:
    known = answers.get("torchao")
    if known is None:
        if "torch" in answers and version_of("torchao"):
            reason = answers.get("failed", "no message")
            wanted = wanted_text("torchao")
            text = f"installed, but cannot be imported: {reason}"
            yield Finding("import torchao", "broken", text, pip(wanted, options="--no-deps --force-reinstall"))
        return
    for message in known["said"]:
        if "Skipping import of cpp extensions" in message or message.startswith("Failed to load"):
            yield Finding("torchao", "fact", f'says "{_short(message)}"; harmless: {_EXTENSIONS}')
            return


def _short(message: str) -> str:
    """torchao's words, without the folders in them."""
    words = message.split(": ")[0] if message.startswith("Failed to load") else message
    return re.sub(r"/\S+/", "", words).rstrip(".")


def describe_optional(answers: Mapping[str, Any]) -> Iterator[Finding]:
    """Packages that some formats or options want: triton, mslk, bitsandbytes."""
    sees = bool((answers.get("torch") or {}).get("available"))
    for name, package, purpose, command in (
        ("triton", "triton", "fused kernels of QAT on a GPU", pip("triton")),
        ("mslk", "mslk-cuda", "kernels of fp8-int4, and of int4 and fp8 by request, on compute capability 9.0", ""),
        ("bitsandbytes", "bitsandbytes", "QLoRA (model.load_in_4bit)", pip("bitsandbytes")),
    ):
        found = version_of(package)
        if found is not None:
            yield Finding(name, "yes", f"{found}: {purpose}")
        elif name == "bitsandbytes" or sees:
            yield Finding(name, "no", f"not installed: {purpose}", command or pip(package))
        else:
            yield Finding(name, "fact", f"not installed, and of no use without a GPU: {purpose}")


def python_fits(lock_name: str) -> bool:
    """Whether this interpreter is the one that a lock is for: cuda-py312.txt is for 3.12."""
    return lock_name.endswith(f"py{sys.version_info[0]}{sys.version_info[1]}.txt")
