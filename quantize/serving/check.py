"""What would fail in vLLM after minutes, or at each request, is found in a folder before the engine starts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.files import read_mapping
from quantize.record import read_record
from quantize.schemes import SCHEMES, Scheme, Target, served_formats
from quantize.serving import reading
from quantize.serving.environment import COMMAND, Vllm
from quantize.serving.layout import Weight, find_faults, read_weights
from quantize.sources import is_known

_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("tekken.json",))
"""Files of which one line must be there."""

_NOT_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4", "plamo2")
"""Kinds of models that vLLM refuses in float16 (vllm/config/model.py)."""


@dataclass(frozen=True)
class Served:
    """A folder that vLLM can serve.

    Attributes:
        folder: where it lies. name: what requests call the model, if nothing else is said.
        arguments: of `vllm serve`, which it needs: nobody should have to guess them.
        scheme, target: its format; None = it is not quantised, or by a format that is not known here.
        chats: the tokenizer has a chat template.
        dtype: of what is not quantised, by config.json; "" = it does not say.
    """

    folder: Path
    name: str
    arguments: tuple[str, ...]
    scheme: Scheme | None
    target: Target | None
    chats: bool
    dtype: str = ""


def check_folder(
    folder: Path,
    vllm: Vllm | None = None,
    *,
    chat: bool = True,
    tokenizer: bool = True,
    trust_remote_code: bool = False,
    name: str = "",
) -> Served:
    """Refuses a folder that vLLM cannot serve.

    Args:
        folder: checkpoint in transformers format, quantised by torchao or not at all.
        vllm: the environment that will serve it; None = what it holds is not looked at.
        chat: the chat endpoint is wanted, and no template is given beside the folder.
        tokenizer: none is given beside the folder.
        trust_remote_code: the user lets the checkpoint's own code run.
        name: what requests call it; the folder's by default.

    Raises:
        UserError: what is wrong, where, and what to do; all that is found, a line each.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give a run or a folder in transformers format")
    settings = read_mapping(folder / "config.json")
    if "ongrid_packed" in settings:
        raise UserError(
            f"{folder} is packed, which vLLM cannot read; unpack it: quantize convert {folder} --unpack --output NEW"
        )
    faults = [*(_tokenizer_faults(folder, chat) if tokenizer else ())]
    faults += _code_faults(folder, settings, trust_remote_code)
    quantisation = settings.get("quantization_config")
    scheme: Scheme | None = None
    target: Target | None = None
    weights = read_weights(folder)
    if quantisation:
        scheme, target = find_format(folder, weights)
        faults += _quantised_faults(folder, quantisation, weights, scheme, target, vllm)
        faults += _dtype_faults(folder, settings)
    if faults:
        raise UserError(*faults)
    arguments = needed_arguments(settings, target, trust_remote_code=trust_remote_code)
    chats = _has_template(folder)
    return Served(folder, name or folder.resolve().name, arguments, scheme, target, chats, _dtype(settings))


def needed_arguments(
    settings: Mapping[str, Any], target: Target | None, *, trust_remote_code: bool = False
) -> tuple[str, ...]:
    """The options of `vllm serve` that a checkpoint needs.

    Args:
        settings: its config.json.
        target: of its format; None = it is not quantised, or by a format that is not known here.
        trust_remote_code: its own code is to run.
    """
    # A quantised one's scales are of its dtype, and cannot be loaded into another: vLLM's "auto" makes bfloat16 of
    # float32, and float16 of bfloat16 on an older GPU.
    dtype = _dtype(settings) if settings.get("quantization_config") else ""
    return (
        *(("--trust-remote-code",) if trust_remote_code else ()),
        *(("--dtype", dtype) if dtype else ()),
        *(() if target is None else target.vllm_arguments),
    )


def _dtype(settings: Mapping[str, Any]) -> str:
    text = settings.get("text_config") or {}
    said = (each.get(key) for each in (settings, text) for key in ("dtype", "torch_dtype"))
    return str(next(filter(None, said), "")).removeprefix("torch.")


def _dtype_faults(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    if _dtype(settings) == "float16" and settings.get("model_type") in _NOT_IN_FLOAT16:
        yield (
            f"{folder} is in float16, in which vLLM does not compute a {settings['model_type']}, as its numbers "
            "overflow; convert the 16-bit weights again with --dtype bfloat16"
        )


# ---------------------------------------------------------------------- beside the weights


def _tokenizer_faults(folder: Path, chat: bool) -> Iterator[str]:
    if not any(all((folder / each).is_file() for each in files) for files in _TOKENIZERS):
        yield (
            f"{folder} has no tokenizer (tokenizer.json, or tokenizer.model): copy it from the model that this one was "
            "made from: tokenizer*, special_tokens_map.json, vocab*, merges.txt, chat_template*"
        )
    elif chat and not _has_template(folder):
        yield (
            f"{folder}: its tokenizer has no chat template, so that each request for a chat would be refused: give one "
            "with -- --chat-template FILE.jinja, write one as chat_template.jinja into the folder (of a run: "
            "data.chat_template), or serve without chat: --completions-only"
        )


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_mapping(path).get("chat_template"))


def _code_faults(folder: Path, settings: Mapping[str, Any], trust_remote_code: bool) -> Iterator[str]:
    if settings.get("auto_map") and not trust_remote_code and not is_known(settings.get("model_type")):
        yield (
            f"{folder} brings Python code of its own ({', '.join(map(str, settings['auto_map'].values()))}), which is "
            "not run unasked; read it, then say --trust-remote-code"
        )


# ---------------------------------------------------------------------- the format


def find_format(folder: Path, weights: Mapping[str, Weight]) -> tuple[Scheme | None, Target | None]:
    """The format of a quantised folder, by its record, else by torchao's classes in the files; None = none of ours."""
    record = read_record(folder)
    scheme = SCHEMES.get(str(record.get("scheme")))
    target = scheme.targets.get(str(record.get("target"))) if scheme is not None else None
    if target is not None:
        return scheme, target
    quantised = [weight for weight in weights.values() if weight.quantised]
    first = quantised[0] if quantised else Weight("")
    said = json.loads(first.settings or "null") or {}
    active = said.get("act_quant_kwargs") is not None or said.get("activation_quantization") is not None
    kernel = (said.get("kernel_preference") or {}).get("_data")
    bits = str((said.get("target_dtype") or {}).get("_data"))
    guessed = {
        "Int4TilePackedTo4dTensor": ("int4", "cuda-sm80"),
        "Int4Tensor": ("fp8-int4" if "float8" in str(said.get("activation_dtype")) else "int4", "cuda-sm90-mslk"),
        "Float8Tensor": ("fp8", "cuda-sm90-mslk" if kernel == "MSLK" else "cuda-sm89"),
        "Int8Tensor": ("int8-int8" if active else "int8", "cuda"),
        "IntxUnpackedToInt8Tensor": ("int8-int4" if active else bits, "cuda-intx" if bits == "int8" else "cuda"),
    }.get(first.kind)
    if guessed is None or guessed[0] not in SCHEMES:
        return None, None
    scheme = SCHEMES[guessed[0]]
    return scheme, scheme.targets.get(guessed[1])


def _quantised_faults(
    folder: Path,
    settings: Mapping[str, Any],
    weights: Mapping[str, Weight],
    scheme: Scheme | None,
    target: Target | None,
    vllm: Vllm | None,
) -> Iterator[str]:
    method, kind = settings.get("quant_method"), settings.get("quant_type")
    if method != "torchao":
        yield (
            f"{folder} is quantised by {method or 'a method that config.json does not name'}, not by torchao: this "
            f"command knows torchao's formats; try vLLM itself: vllm serve {folder}"
        )
        return
    if not isinstance(kind, dict) or set(kind) != {"default"} or not isinstance(kind["default"], dict):
        yield (
            f"{folder / 'config.json'}: quant_type is not one config under 'default', which is what vLLM reads: the "
            "checkpoint is of another version of transformers; convert its 16-bit weights again"
        )
        return
    if scheme is not None and target is not None and target.vllm:
        yield f"{folder} is {scheme.name} for {target.name}: {target.vllm}. {_instead(folder, scheme, target)}"
        return
    if not any(weight.quantised for weight in weights.values()):
        yield f"{folder}: config.json says torchao, but no weight in its files is quantised; convert it again"
        return
    yield from _reading_faults(folder, kind["default"], weights, vllm)
    yield from (f"{folder}: {fault}" for fault in find_faults(weights, settings))
    wants_mslk = target is not None and "mslk" in target.needs
    if vllm is not None and target is not None and wants_mslk and not vllm.packages.keys() & {"mslk", "mslk-cuda"}:
        yield (
            f"{folder} is for {target.name}, whose kernels are in mslk-cuda, and vLLM's environment has none: "
            f"{vllm.python} -m pip install --no-deps mslk-cuda"
        )


def _reading_faults(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Weight], vllm: Vllm | None
) -> Iterator[str]:
    """Whether the torchao that will serve it reads it; another version than wrote it may."""
    if vllm is not None and vllm.torchao is None:
        yield (
            f"{vllm.executable} has no torchao in its environment, which reads this format; install it there: "
            f"{vllm.python} -m pip install --no-deps torchao=={version('torchao')}"
        )
        return
    classes = sorted({weight.kind for weight in weights.values() if weight.quantised})
    other = vllm is not None and vllm.torchao != version("torchao")
    faults = _faults_there(vllm, config, classes) if other else reading.faults_of(config, classes)
    if faults:
        wrote = (read_record(folder).get("versions") or {}).get("torchao", "another version")
        reads = vllm.torchao if vllm is not None else version("torchao")
        yield (
            f"{folder} was written by torchao {wrote}, and torchao {reads}, which serves it, cannot read "
            f"{'; '.join(faults)}: convert it again, or serve it with that torchao ({COMMAND} installs the exact one)"
        )


def _faults_there(vllm: Vllm | None, config: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """What another torchao than ours says, asked in its own environment: seconds, as it imports torch."""
    assert vllm is not None
    asked = json.dumps({"config": config, "classes": classes})
    try:
        done = subprocess.run(
            [str(vllm.python), reading.__file__], input=asked, capture_output=True, text=True, env=vllm.environment(),
            timeout=300,
        )  # fmt: skip
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = str(error)
    return [f"it: {vllm.python} could not be asked ({said})"]


def _instead(folder: Path, scheme: Scheme, target: Target) -> str:
    """What to do where vLLM is not for a layout: its scheme's other target, else int4."""
    chosen = next(
        ((other, place) for other, place in served_formats() if other is scheme), served_formats()[0]
    )  # fmt: skip
    source = folder.parent / "merged"
    named = source if (source / "config.json").is_file() else read_record(folder).get("source") or "16_BIT_MODEL"
    return (
        f"Convert the 16-bit weights: quantize convert {named} --scheme {chosen[0].name} --target {chosen[1].name} "
        f"--output NEW; a run that is trained for it has --qat {chosen[0].name}"
    )
