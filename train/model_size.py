"""How large a model is, from its config.json or its GGUF header alone: no weights are read, no torch is imported.

Shapes: `O` out_features, `I` in_features of the linear layers inside the transformer's layers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize import hub
from quantize.errors import UserError
from train import models
from train.config import ModelConfig

_TIED = {"gemma2", "gemma3_text", "gemma3", "smollm3"}  # model types whose transformers config ties by default
_NAMED = {  # model types whose linear layers inside the transformer's layers are those of `_attention` and `_mlp`
    "gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3",
}  # fmt: skip
_BYTE_VOCABULARY = 259  # the byte-level tokenizer of tiny random models: 256 bytes and three special tokens
_GGUF_NAMES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}


@dataclass(frozen=True)
class Linear:
    """Linear layers of one kind: name, in_features, out_features, and how many there are."""

    name: str
    inputs: int
    outputs: int
    count: int

    @property
    def weights(self) -> int:
        """Weights of all of them."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class ModelSize:
    """What the estimate needs to know about a model.

    Attributes:
        parameters: all weights, tied ones once.
        linears: the linear layers inside the transformer's layers; lm_head is not among them.
        layers, hidden, vocabulary: numbers of transformer layers, features and tokens.
        source: where this was read.
        named: the names of `linears` are certain; else they are those that a Llama would have.
        experts: the matrices of fused experts, each counted by itself.
    """

    parameters: int
    linears: tuple[Linear, ...]
    layers: int
    hidden: int
    vocabulary: int
    source: str
    named: bool = False
    experts: tuple[Linear, ...] = ()

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers."""
        return sum(linear.weights for linear in self.linears)

    @property
    def quantised_weights(self) -> int:
        """Weights of what a scheme quantises: the linear layers, and the matrices of experts."""
        return self.linear_weights + sum(matrix.weights for matrix in self.experts)


class UnknownSize(Exception):
    """The size cannot be told; the text says why."""


def find_size(config: ModelConfig) -> ModelSize:
    """The size of the configured model.

    Raises:
        UnknownSize: its config.json cannot be reached or says too little.
    """
    if config.random is not None:
        shape = {"model_type": config.architecture, **config.shape}
        if config.random == "tiny":
            few = models.TINY_EXPERTS if re.search("moe|mixtral", config.architecture or "") else {}
            shape = {**models.TINY_SHAPE, **few, "vocab_size": _BYTE_VOCABULARY, **shape}
        return size_of(shape, "model.shape" if config.shape else "the tiny shape")
    if config.id.startswith("pypi:"):
        try:
            return _gguf_size(models.packaged_gguf(config.id))
        except UserError as error:
            raise UnknownSize(str(error)) from error
    path = Path(config.id).expanduser()
    if path.suffix == ".gguf":
        return _gguf_size(path)
    if path.is_dir():
        return _folder_size(path / "config.json")
    return _hub_size(config)


def size_of(settings: Mapping[str, Any], source: str) -> ModelSize:
    """The size of a decoder with gated MLPs (Llama, Qwen3, Phi-3, SmolLM3, Gemma 3, Qwen3-MoE) from its config.

    Raises:
        UnknownSize: a field that it needs is missing.
    """
    inside_another = bool(settings.get("text_config"))  # beside a vision tower, whose layers are not known here
    settings = settings.get("text_config") or settings
    try:
        hidden, layers = int(settings["hidden_size"]), int(settings["num_hidden_layers"])
        inner, heads = int(settings["intermediate_size"]), int(settings["num_attention_heads"])
        vocabulary = int(settings["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnknownSize(f"{source} does not say {error}") from error
    model_type = str(settings.get("model_type") or "")
    head = int(settings.get("head_dim") or hidden // heads)
    query, key = heads * head, int(settings.get("num_key_value_heads") or heads) * head
    experts = int(settings.get("num_experts") or settings.get("num_local_experts") or 0)
    linears = _attention(model_type, hidden, query, key, layers)
    if not experts:
        linears += _mlp(model_type, hidden, inner, layers)
    fused: tuple[Linear, ...] = ()
    if experts:
        inner = int(settings.get("moe_intermediate_size") or inner)
        fused = (
            Linear("gate_up_proj", hidden, 2 * inner, layers * experts),
            Linear("down_proj", inner, hidden, layers * experts),
        )
    inside = sum(linear.weights for linear in (*linears, *fused))
    tied = settings.get("tie_word_embeddings")
    tied = model_type in _TIED if tied is None else tied
    parameters = inside + vocabulary * hidden * (1 if tied else 2) + (2 * layers + 1) * hidden
    named = model_type in _NAMED and not experts and not inside_another
    return ModelSize(parameters, linears, layers, hidden, vocabulary, source, named, fused)


def _attention(model_type: str, hidden: int, query: int, key: int, layers: int) -> tuple[Linear, ...]:
    output = Linear("o_proj", query, hidden, layers)
    if model_type == "phi3":
        return (Linear("qkv_proj", hidden, query + 2 * key, layers), output)
    return (
        Linear("q_proj", hidden, query, layers),
        Linear("k_proj", hidden, key, layers),
        Linear("v_proj", hidden, key, layers),
        output,
    )


def _mlp(model_type: str, hidden: int, inner: int, layers: int) -> tuple[Linear, ...]:
    down = Linear("down_proj", inner, hidden, layers)
    if model_type == "phi3":
        return (Linear("gate_up_proj", hidden, 2 * inner, layers), down)
    return (Linear("gate_proj", hidden, inner, layers), Linear("up_proj", hidden, inner, layers), down)


def _folder_size(path: Path, source: str | None = None) -> ModelSize:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownSize(f"{path} cannot be read: {error}") from error
    return size_of(settings, source or str(path))


def _hub_size(config: ModelConfig) -> ModelSize:
    """From the hub's cache, else from the hub: one short request, without the client's minutes of retries."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(config.id, "config.json", revision=config.revision)
    except HFValidationError as error:
        raise UnknownSize(f"{config.id} is no local folder and no hub id ({str(error).splitlines()[0]})") from error
    if isinstance(cached, str):
        return _folder_size(Path(cached), f"the cached config.json of {config.id}")
    try:
        settings = hub.model_settings(config.id, config.revision)
    except hub.HubProblem as error:
        raise UnknownSize(f"{config.id} is not in the local cache, and {error}") from error
    return size_of(settings, f"config.json of {config.id} on the hub")


def _gguf_size(path: Path) -> ModelSize:
    if not path.is_file():
        raise UnknownSize(f"there is no file {path}")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        tensors = [(tensor.name, [int(n) for n in tensor.shape]) for tensor in reader.tensors]
        architecture = reader.fields.get("general.architecture")
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UnknownSize(f"{path} cannot be read as GGUF: {error}") from error
    # GGUF lists dimensions innermost first: a linear's weight is (I, O), the embedding (hidden, vocabulary).
    hidden, vocabulary = next((shape for name, shape in tensors if name == "token_embd.weight"), (0, 0))
    linears: Counter[tuple[str, int, int]] = Counter()
    parameters, blocks = 0, set()
    for name, shape in tensors:
        count = 1
        for n in shape:
            count *= n
        parameters += count
        kind, _, last = name.removeprefix("blk.").partition(".")
        if name.startswith("blk."):
            blocks.add(kind)
            if len(shape) == 2:
                part = last.removesuffix(".weight")
                linears[_GGUF_NAMES.get(part, part), shape[0], shape[1]] += 1
    if not hidden or not linears:
        raise UnknownSize(f"{path} holds no transformer layers that this estimate knows")
    found = tuple(Linear(*shape, count=count) for shape, count in linears.items())
    known = architecture is not None and architecture.contents() in _NAMED
    named = known and {linear.name for linear in found} <= set(_GGUF_NAMES.values())
    return ModelSize(parameters, found, len(blocks), hidden, vocabulary, f"the header of {path.name}", named)
