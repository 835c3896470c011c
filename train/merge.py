"""Merges a finished fit into a 16-bit checkpoint: W + s B A. The grid that QAT trained is apart (`quantize.grid`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.adapters import adapter_of, base_linear, merged_16_bit, on_experts
from qat.experts import expert_matrices
from quantize.convert import copy_companions
from quantize.experts import has_experts
from quantize.layers import plain_name
from train.fit import Learner

if TYPE_CHECKING:
    from train.config import ModelConfig


@torch.no_grad()
def write_merged(learner: Learner, source: Path, output: Path, *, dtype: str, settings: ModelConfig) -> None:
    """Writes `output` as a transformers checkpoint in safetensors, with tokenizer and chat template.

    Args:
        learner: the trained model; its weights are read, not changed.
        source: the model before fine-tuning: config, tokenizer and, under QLoRA, the 16-bit weights.
        dtype: dtype of the merged weights.
        settings: section `model`. With load_in_4bit the live base weights are 4-bit, so W is read from `source`.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, GenerationConfig
    from transformers.core_model_loading import revert_weight_conversion

    target = getattr(torch, dtype)
    weights = _source_weights(source) if settings.load_in_4bit else _live_weights(learner.model)
    for name, matrix in expert_matrices(learner.model).items():
        if matrix.wrapper is not None:
            weights[name] = matrix.merged()
    for name, module in learner.model.named_modules():
        if adapter_of(module)[0] is None or on_experts(module):
            continue
        key = f"{plain_name(name)}.weight"
        if settings.load_in_4bit:
            lora_a, lora_b = adapter_of(module)
            (adapter,) = module.active_adapters
            delta = module.scaling[adapter] * (lora_b.float() @ lora_a.float())  # type: ignore[union-attr]
            weights[key] = (weights[key].to(delta.device).float() + delta).to(target)
        elif any(module.use_dora.values()):
            weights[key] = _peft_merged_weight(module)
        else:
            weights[key] = merged_16_bit(module, target)
    state = {name: weight.detach().to("cpu", target).contiguous() for name, weight in weights.items()}
    if has_experts(learner.model):
        # An expert's weights apart, under the names that other programs know too.
        parted = revert_weight_conversion(learner.model.get_base_model(), state)
        state = {name: weight.clone() for name, weight in parted.items()}
    save_torch_state_dict(state, output, metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=settings.trust_remote_code)
    config.dtype = target
    config.save_pretrained(output)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(output)
    copy_companions(source, output)


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
    """Plain parameter name -> weight, adapters left out, each tied weight once."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and ".original_module." not in name:
            module, _, leaf = name.rpartition(".")
            found[f"{plain_name(module)}.{leaf}"] = parameter.data
    return found


def _source_weights(source: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: weight for path in sorted(source.glob("*.safetensors")) for name, weight in load_file(path).items()}
