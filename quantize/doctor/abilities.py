"""What can be trained, run and exported here, from what was found: no probe of its own touches torch."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from quantize.doctor.findings import Finding, first_line, lock_of, pip, tilde
from quantize.doctor.packages import cuda_command, extra_command, python_fits, version_of, wanted_text
from quantize.errors import UserError
from quantize.schemes import SCHEMES, Scheme, served_formats

FUSED, FUSED_FLOAT8 = (8, 0), (8, 9)
"""Compute capabilities from which QAT takes its fused kernels: bf16 is Ampere's, float8 Ada's (qat.kernels.path_of)."""
_GPU_ONLY = ("torchvision", "xformers", "triton")
"""What unsloth asks for and a CPU needs none of."""
_NEVER_NEEDED = ("xformers",)
_LEGEND = (
    "targets that run here are taken by themselves, those by request where --quantize.target=NAME asks for them; a "
    "format that is simulated trains and is measured with the numbers of the hardware it needs, and ships from there"
)
_UNTRIED = "importing it, which takes up to half a minute, was not tried: quantize doctor --imports does"


def capability(answers: Mapping[str, Any]) -> tuple[int, int] | None:
    """The compute capability that torch would use; None without a GPU that computes."""
    working = [device for device in answers.get("devices", ()) if device["computes"] is None]
    if not working:
        return None
    major, minor = working[0]["capability"].split(".")
    return int(major), int(minor)


# ---- train -----------------------------------------------------------------------------------------------------------


def describe_training(answers: Mapping[str, Any]) -> Iterator[Finding]:
    """Backends, the device, dtype, fused kernels, QLoRA."""
    if "torch" not in answers:
        yield Finding("training", "broken", "nothing trains until torch can be imported (see packages)")
        return
    found = capability(answers)
    yield from _unsloth(answers["torch"]["cuda"] is None)
    lacking = [name for name in ("transformers", "peft", "trl") if version_of(name) is None]
    if lacking:
        yield Finding(
            "backend peft", "broken", f"{', '.join(lacking)} missing (see packages)", pip(*map(wanted_text, lacking))
        )
    else:
        yield Finding("backend peft", "yes", "plain transformers and PEFT: train ... --model.backend=peft")
    if found is None:
        yield Finding("device", "yes", "the processor, weights in float32 (model.dtype=auto): for models of some 100M")
        yield Finding("fused kernels", "no", "need a GPU; QAT computes by the definition of the numbers, equal bits")
    else:
        name = answers["devices"][0]["name"]
        yield Finding("device", "yes", f"{name}, weights in bfloat16 (model.dtype=auto)")
        yield _fused(found)
    yield _qlora()


def _fused(found: tuple[int, int]) -> Finding:
    if version_of("triton") is None:
        return Finding(
            "fused kernels",
            "no",
            "Triton is missing: QAT computes by the definition, slowly",
            pip("triton"),
        )
    here = f"{found[0]}.{found[1]}"
    if found < FUSED:
        return Finding("fused kernels", "no", f"need compute capability 8.0 or newer, this GPU has {here}")
    if found < FUSED_FLOAT8:
        return Finding("fused kernels", "yes", f"for integer formats; those of fp8 need 8.9, this GPU has {here}")
    return Finding("fused kernels", "yes", "for int8-int4, int4, int3, int2, int8, Intx of 8 bits, and fp8")


def _qlora() -> Finding:
    if version_of("bitsandbytes") is None:
        return Finding("QLoRA", "no", "model.load_in_4bit needs bitsandbytes", pip("bitsandbytes"))
    return Finding("QLoRA", "yes", "model.load_in_4bit=true, without qat: a format then comes after training")


def _unsloth(cpu_torch: bool) -> Iterator[Finding]:
    """Without importing it: what its packages ask for, and the build of torchvision that breaks it."""
    name = "backend unsloth"
    if version_of("unsloth") is None or version_of("unsloth_zoo") is None:
        text = "the default, not installed; model.backend=peft trains without it"
        yield Finding(name, "no", text, _unsloth_command(cpu_torch))
        return
    vision = version_of("torchvision")
    plain = vision is not None and "+cpu" not in vision and platform.machine() == "x86_64" and sys.platform == "linux"
    if cpu_torch and plain:
        text = f"torchvision {vision} is a CUDA build, and breaks `import unsloth` beside a CPU build of torch"
        yield Finding(name, "broken", text, pip("torchvision").replace(" install ", " uninstall -y "))
        return
    left_out = _GPU_ONLY if cpu_torch else _NEVER_NEEDED
    lacking = sorted({text for package in ("unsloth", "unsloth_zoo") for text in _lacking(package, left_out)})
    if lacking:
        text = f"what it needs is missing: {', '.join(lacking)}; model.backend=peft trains without it"
        yield Finding(name, "broken", text, pip(*lacking, options="--no-deps"))
        return
    yield Finding(name, "yes", f"{version_of('unsloth')}, the default; {_UNTRIED}")


def _unsloth_command(cpu_torch: bool) -> str:
    if not cpu_torch:
        return extra_command("unsloth")
    lock = lock_of("cpu")
    if lock is None or not python_fits(lock.name):
        return "train --config tiny.yaml --qat int8-int4 --model.backend=peft"
    return pip("-r", str(lock), options="--no-deps")


def _lacking(package: str, left_out: tuple[str, ...]) -> Iterator[str]:
    """Requirements of an installed package that are not installed at all; versions are its own affair."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for line in metadata.requires(package) or ():
        needed = Requirement(line)
        applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(needed.name) not in left_out and version_of(needed.name) is None:
            yield f"{needed.name}{needed.specifier}"


# ---- run -------------------------------------------------------------------------------------------------------------


def describe_running(answers: Mapping[str, Any]) -> Iterator[Finding]:
    """Each scheme: where it runs here, where it does not, and what that would need."""
    targets = answers.get("targets")
    if targets is None:
        reason = answers.get("failed", "no reason given")
        yield Finding("formats", "broken", f"not known until torch can be imported ({reason})")
        return
    yield Finding("how to read", "fact", _LEGEND)
    for scheme in SCHEMES.values():
        yield _scheme(scheme, targets[scheme.name])
    yield from _remedies(targets, answers)


def _scheme(scheme: Scheme, missing: Mapping[str, list[str]]) -> Finding:
    here = [target for name, target in scheme.targets.items() if not missing[name]]
    runs = [target.name for target in here if not target.by_request]
    asks = [target.name for target in here if target.by_request]
    parts = [", ".join(runs)] if runs else []
    parts += [f"by request {', '.join(asks)}"] if asks else []
    needs = [f"{name} ({', '.join(target.needs)})" for name, target in scheme.targets.items() if missing[name]]
    parts += [f"not here {', '.join(needs)}"] if needs else []
    return Finding(scheme.name, "yes" if runs else "simulated", "; ".join(parts))


def _remedies(targets: Mapping[str, Mapping[str, list[str]]], answers: Mapping[str, Any]) -> Iterator[Finding]:
    """What would make more of them run, each thing once."""
    reasons = {reason for scheme in targets.values() for lacking in scheme.values() for reason in lacking}
    if any("built without CUDA" in reason for reason in reasons):
        text = (
            f"torch {answers['torch']['version']} is built without CUDA; where there is a GPU, a build for it runs them"
        )
        yield Finding("cuda>=...", "no", text, cuda_command())
    if any("compute capability" in reason for reason in reasons):
        text = "a run of here is finished where a GPU runs its target: copy its folder there"
        yield Finding("cuda>=...", "no", text, "quantize convert RUN --target NAME")
    if any("mslk" in reason for reason in reasons):
        found = capability(answers)
        useful = found is not None and found >= (9, 0)
        text = "the package mslk-cuda is missing, of use from compute capability 9.0 on"
        yield Finding("mslk", "no" if useful else "fact", text, pip("mslk-cuda") if useful else "")


# ---- export ----------------------------------------------------------------------------------------------------------


def describe_exports(folder: Path, *, gpu: bool) -> Iterator[Finding]:
    """ExecuTorch's environment, and vLLM, which a card's commands name.

    Args:
        folder: where ExecuTorch's packages lie (`quantize.export.environment.packages_folder`).
        gpu: this machine has one.
    """
    from quantize.export.environment import COMMAND, PACKAGES, find_packages

    try:
        find_packages(folder)
    except UserError as error:
        yield Finding("ExecuTorch", "no", first_line(error).partition("; ")[0], COMMAND)
    else:
        yield Finding("ExecuTorch", "yes", f"{PACKAGES[0]}: quantize export RUN, of int8-int4 for executorch")
    yield _vllm(gpu=gpu)


def _vllm(*, gpu: bool) -> Finding:
    """Which one `quantize serve` would take, and what it serves."""
    from quantize.serving.environment import COMMAND, find_vllm, lock_pins

    formats = ", ".join(f"{scheme.name} for {target.name}" for scheme, target in served_formats())
    try:
        found = find_vllm()
    except UserError as error:
        text = first_line(error).partition("; ")[0]
        return Finding("vLLM", "no" if gpu else "fact", f"{text}; on a GPU it serves {formats}", COMMAND if gpu else "")
    exact = lock_pins()["vllm"]
    other = "" if found.version == exact else f", tried was {exact} ({COMMAND})"
    torchao = f"torchao {found.torchao}" if found.torchao else "without torchao, so it serves 16 bit alone"
    text = f"{found.version} {found.found} ({tilde(found.executable)}), {torchao}{other}; it serves {formats}"
    return Finding("vLLM", "yes" if found.torchao else "broken", text)
