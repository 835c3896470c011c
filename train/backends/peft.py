"""Plain transformers and PEFT: no patches, every architecture, no AGPL parts."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.experts import has_experts
from train.backends import linear_names

if TYPE_CHECKING:
    from train.config import LoraConfig, ModelConfig


def lora_settings(lora: LoraConfig, model: Any) -> Any:
    """peft's LoraConfig of the section `lora`.

    With fused experts peft's own all-linear takes these and the router, too; here `target_parameters` names them.
    """
    import peft

    names = lora.target_modules == "all-linear" and has_experts(model)
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=linear_names(model) if names else lora.target_modules,
        target_parameters=lora.target_parameters,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )


class PeftBackend:
    """`AutoModelForCausalLM` and `peft.get_peft_model`."""

    name = "peft"

    def load(self, folder: Path, config: ModelConfig, *, dtype: str, max_length: int, full: bool) -> Any:
        """See `Backend.load`."""
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        options: dict[str, Any] = {}
        if config.load_in_4bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
            )
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            attn_implementation=config.attn_implementation or "sdpa",
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            **options,
        )

    def add_lora(self, model: Any, lora: LoraConfig, *, seed: int, gradient_checkpointing: bool) -> Any:
        """See `Backend.add_lora`."""
        import peft

        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        return peft.get_peft_model(model, lora_settings(lora, model))

    def computing(
        self, fake_quantised: Collection[str], *, dtype: str, logits: bool = False
    ) -> AbstractContextManager[None]:
        """See `Backend.computing`."""
        return nullcontext()
