"""Merges a fine-tuned model into a 16-bit checkpoint: W + s B A. The grid that QAT trained is apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.adapters import adapter_of, base_linear, merged_16_bit, on_experts
from qat.experts import expert_matrices
from quantize.experts import has_experts
from quantize.layers import plain_name


@torch.no_grad()
def save_merged_weights(
    model: Any, output: Path, dtype: torch.dtype, stored: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the weights of a model, its active adapter merged, into the folder `output` as safetensors.

    Args:
        model: with PEFT's adapters or without; it is read, not changed.
        dtype: that of the merged weights.
        stored: plain parameter name -> W in 16 bit, where the live ones are in 4 bit.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers.core_model_loading import revert_weight_conversion

    weights = _live_weights(model) if stored is None else dict(stored)
    for name, matrix in expert_matrices(model).items():
        if matrix.wrapper is not None:
            weights[name] = matrix.merged()
    for name, module in model.named_modules():
        lora_a, lora_b = adapter_of(module)
        if lora_a is None or lora_b is None or on_experts(module):
            continue
        key = f"{plain_name(name)}.weight"
        if stored is not None:
            (adapter,) = module.active_adapters
            delta = module.scaling[adapter] * (lora_b.float() @ lora_a.float())
            weights[key] = (weights[key].to(delta.device).float() + delta).to(dtype)
        elif any(module.use_dora.values()):
            weights[key] = _peft_merged_weight(module)
        else:
            weights[key] = merged_16_bit(module, dtype)
    state = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    if has_experts(model):
        # An expert's weights apart, under the names that other programs know too.
        parted = revert_weight_conversion(base_model_of(model), state)
        state = {name: weight.clone() for name, weight in parted.items()}
    save_torch_state_dict(state, output, metadata={"format": "pt"})


def base_model_of(model: Any) -> Any:
    """The transformers model under PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _peft_merged_weight(module: Any) -> Tensor:
    """The weight as peft merges it: for adapters that are more than W + s B A."""
    linear = base_linear(module)
    before = linear.weight.data.clone()
    module.merge(safe_merge=True)
    merged = linear.weight.data
    linear.weight.data = before
    module.merged_adapters.clear()
    return merged


def _live_weights(model: Any) -> dict[str, Tensor]:
    """Plain parameter name -> weight, adapters left out, each tied weight once.

    Of a module that peft trains whole (`modules_to_save`), the copy of the active adapter.
    """
    active = getattr(model, "active_adapters", ()) if hasattr(model, "peft_config") else ()
    active = list(active() if callable(active) else active)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        _, copied, after = name.partition(".modules_to_save.")
        if ".lora_" in name or ".original_module." in name or (copied and after.partition(".")[0] not in active):
            continue
        module, _, leaf = name.rpartition(".")
        found[f"{plain_name(module)}.{leaf}"] = parameter.data
    return found
