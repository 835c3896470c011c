"""A card's sections on loading a release: code and commands that run as shown, or the reason why there is none."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator

from quantize.document import Block, Code, Heading, Paragraph
from quantize.release.source import Release
from quantize.release.text import export_code
from quantize.schemes import served_formats
from quantize.serving.check import needed_arguments
from quantize.serving.environment import lock_pins

_EXECUTORCH = ("int8-int4", "int8-int4-mobile")
_PROMPT = "What is the sum of 12 and 30?"


def usage_sections(release: Release) -> Iterator[Block]:
    """transformers, vLLM, ExecuTorch."""
    yield Heading("Use it")
    yield Heading("transformers", 3)
    needed = [*(_pinned(release, name) for name in ("torch", "torchao", "transformers")), "accelerate"]
    needed += _kernels(release)
    yield Code(f"pip install {' '.join(needed)}")
    yield Code(transformers_code(release), "python")
    if release.own_code:
        yield Paragraph("trust_remote_code runs the Python files that lie beside the weights: read them first.")
    yield Paragraph(_where(release))
    yield Heading("vLLM", 3)
    yield from _vllm(release)
    yield Heading("ExecuTorch", 3)
    yield from _executorch(release)


def transformers_code(release: Release) -> str:
    """Loads the release and generates some tokens."""
    trust = ", trust_remote_code=True" if release.own_code else ""
    device = "cuda" if (release.target or "").startswith("cuda") else "auto"
    if release.chats:
        encode = [
            f'messages = [{{"role": "user", "content": "{_PROMPT}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    else:
        encode = [f'inputs = tokenizer("{_PROMPT}", return_tensors="pt").to(model.device)']
    experts = ', experts_implementation="eager"' if release.experts else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if release.experts and _is_intx(release):
        lines[:0] = ["from quantize.experts import let_tensors_select  # of ongrid"]
        lines += ["let_tensors_select()  # torchao cannot pick one of many experts in this layout"]
    lines += [
        f'model_id = "{release.name}"',
        f"tokenizer = AutoTokenizer.from_pretrained(model_id{trust})",
        f'model = AutoModelForCausalLM.from_pretrained(model_id, device_map="{device}"{experts}{trust})',
        *encode,
        "outputs = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _is_intx(release: Release) -> bool:
    return "Intx" in json.dumps(release.settings.get("quantization_config") or {})


def _where(release: Release) -> str:
    place = release.place
    if place is None:
        return "config.json names the layout of the weights, which torchao restores while it loads."
    needs = " and ".join(_need(need) for need in place.needs)
    runs = f"The target {place.name} needs {needs}." if needs else f"The target {place.name} needs no accelerator."
    return f"{runs} Decoding in transformers, as measured for this format: {place.speed or 'not measured'}."


def _need(need: str) -> str:
    name, _, wanted = need.partition(">=")
    if name == "cuda":
        return f"a CUDA GPU of compute capability {wanted} or newer"
    return f"the package {'mslk-cuda' if name == 'mslk' else name}"


def _kernels(release: Release) -> list[str]:
    return ["mslk-cuda"] if release.place is not None and "mslk" in release.place.needs else []


def _vllm(release: Release) -> Iterator[Block]:
    why = _why_not_vllm(release)
    if why:
        plain = [f"{scheme.name} ({target.name})" for scheme, target in served_formats() if "mslk" not in target.needs]
        formats = f"{', '.join(plain[:-1])} or {plain[-1]}"
        yield Paragraph(f"No command is given: {why}. For vLLM convert the 16-bit weights to {formats}.")
        return
    assert release.place is not None, "which layout this is is recorded"
    needed = needed_arguments(release.settings, release.place, trust_remote_code=release.own_code)
    packages = " ".join([*_served_by(), *_kernels(release)])
    yield Code(f"pip install {packages}\n{shlex.join(['vllm', 'serve', release.name, *needed])}")
    yield Paragraph(
        "In an environment of its own: vLLM brings a torch of its own. It reads the layout from config.json through "
        f"torchao. Its speed, as measured for this format: {release.place.served or 'not measured'}. With ongrid: "
        "`quantize serve` installs it, looks for what vLLM would refuse, and compares it with transformers (--check)."
    )


def _why_not_vllm(release: Release) -> str:
    """Why vLLM is not for a release; empty = it loads it as it is."""
    if release.experts:
        return "vLLM does not load fused experts in torchao's layouts"
    if release.place is None:
        return "which layout this is is not recorded"
    return f"{release.scheme} for {release.target}: {release.place.vllm}" if release.place.vllm else ""


def _served_by() -> list[str]:
    """The exact packages, of the environment that was tried."""
    pins = lock_pins()
    return [f"{name}=={pins[name]}" for name in ("vllm", "torchao")]


def _executorch(release: Release) -> Iterator[Block]:
    if release.experts:
        yield Paragraph("Not for a mixture of experts: the exporter knows dense decoders.")
        return
    if release.scheme in _EXECUTORCH:
        yield Paragraph(
            "A .pte for phones and CPUs, with the XNNPACK backend and a KV cache, from the quantised weights as they "
            "are, by ongrid (quantize export --setup installs ExecuTorch):"
        )
        yield Code(export_code(release.name))
        return
    what = release.scheme or "this layout"
    yield Paragraph(
        f"Not for {what}: ExecuTorch's XNNPACK backend runs int8 activations with int4 weights. For a phone train or "
        "convert with int8-int4 or int8-int4-mobile."
    )


def _pinned(release: Release, name: str) -> str:
    """`torch==2.13.0`, as it was used, without the local part of a build (2.13.0+cpu), which no index knows."""
    version = re.split(r"[+\s]", release.versions.get(name, ""), maxsplit=1)[0]
    return f"{name}=={version}" if version else name
