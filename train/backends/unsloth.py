"""Unsloth, on CUDA and on the CPU. The only file that imports it, and it does so before transformers and trl."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import unsloth  # noqa: F401  first of all: it patches transformers and trl

from train.backends import linear_names

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
            targets = linear_names(model)
        return FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            target_modules=targets,
            target_parameters=lora.target_parameters or [],  # None lets unsloth choose experts by itself
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            use_rslora=lora.use_rslora,
            use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
            random_state=seed,
        )

    @contextmanager
    def computing(self, fake_quantised: Collection[str], *, dtype: str, logits: bool = False) -> Iterator[None]:
        """See `Backend.computing`."""
        # Unsloth reads all three variables at each call.
        settings: dict[str, str] = {}
        if dtype == "float32":
            # Else unsloth trains float32 weights under bf16 autocast. "bfloat16" is its word for no autocast at all.
            settings["UNSLOTH_MIXED_PRECISION"] = "bfloat16"
        if fake_quantised:
            # On CUDA unsloth compiles each decoder layer as one region. The compiler may keep in fp32 what the round
            # trip rounds to bf16 in between, which would train other numbers than those that ship. Without the region
            # its fused kernels run, and they call a fake-quantised projection as it is.
            settings["UNSLOTH_BLOCK_COMPILE"] = "0"
        if logits or "lm_head" in fake_quantised:
            # The chunked loss multiplies by lm_head's weight and goes past its quantiser; with logits it is called.
            settings["UNSLOTH_RETURN_LOGITS"] = "1"
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
