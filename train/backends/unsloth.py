"""Unsloth, on CUDA and on the CPU. The only file that imports it, and it does so before transformers and trl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import unsloth  # noqa: F401  first of all: it patches transformers and trl

if TYPE_CHECKING:
    from train.config import LoraConfig, ModelConfig


class UnslothBackend:
    """`FastLanguageModel`: fused kernels on CUDA, stock transformers with chunked cross entropy on the CPU."""

    name = "unsloth"

    def load(self, folder: Path, config: ModelConfig, *, dtype: str, max_length: int, full: bool) -> Any:
        """See `Backend.load`."""
        import torch
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder),
            max_seq_length=max_length,
            dtype=getattr(torch, dtype),
            load_in_4bit=config.load_in_4bit,
            full_finetuning=full,
            trust_remote_code=config.trust_remote_code,
            **({"attn_implementation": config.attn_implementation} if config.attn_implementation else {}),
        )
        return model

    def add_lora(self, model: Any, lora: LoraConfig, *, seed: int, gradient_checkpointing: bool) -> Any:
        """See `Backend.add_lora`."""
        from unsloth import FastLanguageModel

        targets = lora.target_modules
        if targets == "all-linear":
            targets = sorted({name.rsplit(".", 1)[-1] for name in _linear_names(model)})
        return FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            target_modules=targets,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            use_rslora=lora.use_rslora,
            use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
            random_state=seed,
        )


def _linear_names(model: Any) -> list[str]:
    from quantize.layers import linear_layers

    return [name for name, _ in linear_layers(model) if not name.endswith("lm_head")]
