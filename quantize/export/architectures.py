"""Which transformers models ExecuTorch's Transformer computes, and what their weights are called there (Meta's names).

Imports no torch: what cannot be exported is refused before anything heavy starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantize.errors import UserError

ARCHITECTURES = ("llama", "phi3", "qwen2", "qwen3", "smollm3")
"""`model_type` of config.json; SmolLM2 is llama, Phi-4-mini is phi3."""

_PARTS = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm_fn",
    "self_attn.k_norm": "attention.k_norm_fn",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "norm": "norm",
}


def meta_name(name: str) -> str:
    """Meta's name of a weight: "model.layers.3.self_attn.q_proj.weight" -> "layers.3.attention.wq.weight".

    Raises:
        UserError: ExecuTorch's Transformer has no such weight.
    """
    match = re.fullmatch(r"(?:model\.)?(layers\.\d+\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _PARTS:
        raise UserError(f"the weight {name} has no place in ExecuTorch's Transformer")
    return f"{match[1] or ''}{_PARTS[match[2]]}.{match[3]}"


def check_architecture(config: Mapping[str, Any], length: int) -> None:
    """Refuses what ExecuTorch's Transformer would compute otherwise than transformers does.

    Args:
        config: of config.json.
        length: tokens that the exported model keeps.

    Raises:
        UserError: with every reason.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{kind} cannot be exported to ExecuTorch; it takes {', '.join(ARCHITECTURES)}")
    reasons = []
    if config.get("hidden_act", "silu") != "silu":
        reasons.append(f"hidden_act is {config['hidden_act']}, not silu")
    if config.get("mlp_bias") or (config.get("attention_bias") and kind != "qwen2"):
        reasons.append("its linear layers have biases")
    window = config.get("sliding_window")
    slides = "sliding_attention" in (config.get("layer_types") or ()) or (kind == "phi3" and window)
    if slides and window and window < length:
        reasons.append(f"its attention slides over {window} tokens; --max-seq-len {window} stays within")
    most = config.get("max_position_embeddings")
    if most and most < length:
        reasons.append(f"its context is {most} tokens; say --max-seq-len {most} or less")
    rope = rope_settings(config)
    kind_of_rope = rope.get("rope_type", rope.get("type", "default"))
    if kind_of_rope == "dynamic":
        reasons.append("its rotary embedding changes with the length of the text (rope_type dynamic)")
    first = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind_of_rope == "longrope" and first and first < length:
        reasons.append(f"beyond {first} tokens its rotary embedding is another one; say --max-seq-len {first} or less")
    if reasons:
        raise UserError(*(f"this {kind} cannot be exported to ExecuTorch: {reason}" for reason in reasons))


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings, which config.json keeps under one of two names."""
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def transformer_arguments(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Arguments of ExecuTorch's `ModelArgs` for a transformers configuration.

    The rotary embedding's table is not among them: it is taken from the transformers model itself.

    Args:
        length: tokens that the KV cache holds.
    """
    kind = config["model_type"]
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "vocab_size": config["vocab_size"],
        "hidden_dim": config["intermediate_size"],
        "head_dim": head_dim(config),
        "norm_eps": config["rms_norm_eps"],
        "max_seq_len": length,
        "max_context_len": length,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache_op": True,
        "enable_dynamic_shape": True,
        "use_hf_rope": True,
        "attention_qkv_bias": kind == "qwen2",
        "use_qk_norm": kind == "qwen3",
        "qk_norm_before_rope": True,
    }


def layers_without_rope(config: Mapping[str, Any]) -> list[int]:
    """Numbers of the layers that do not rotate (SmolLM3's every fourth)."""
    return [number for number, rotates in enumerate(config.get("no_rope_layers") or ()) if not rotates]


def fused_rows(config: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Phi's fused weights: last part of the name -> what its rows are, in order, and how many of each."""
    if config["model_type"] != "phi3":
        return {}
    width, heads = head_dim(config), config["num_attention_heads"]
    keys = (config.get("num_key_value_heads") or heads) * width
    return {
        "qkv_proj": {"q_proj": heads * width, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {"gate_proj": config["intermediate_size"], "up_proj": config["intermediate_size"]},
    }
