"""Tiny random models of several architectures with adapters that do something, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IDS = torch.arange(5, 45).reshape(2, 20)


def tiny_model(architecture: str = "qwen3", *, tied: bool = True, seed: int = 0, **options: Any) -> Any:
    """Two layers, hidden size 64; biases, where the architecture has them, and norms are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(architecture).to_dict()
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": None, "tie_word_embeddings": tied, "initializer_range": 0.1,
    }  # fmt: skip
    shape = {name: value for name, value in shape.items() if name in known or name in ("pad_token_id", "bos_token_id")}
    if known.get("layer_types"):
        shape["layer_types"] = ["full_attention"] * 2
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape | options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def with_lora(model: Any, *, seed: int = 0, r: int = 4, **lora: Any) -> Any:
    """A PEFT model whose adapters are no longer zero."""
    import peft

    settings = {"target_modules": "all-linear", "lora_alpha": 8, **lora}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=r, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed + 100)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    """Logits without a graph."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def gradients(model: Any, ids: Tensor = IDS, *, autocast: bool = False, scale: float = 1.0) -> dict[str, Tensor]:
    """Parameter name -> gradient of the loss, those before cleared."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (loss * scale).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def save_plain(model: Any, folder: Path) -> Path:
    """The 16-bit model on disk, with the tokenizer that merging copies."""
    from train.models import byte_tokenizer

    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
