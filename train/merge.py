"""Merges a finished fit into a 16-bit checkpoint, with what lies beside the weights of the model before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.merge import save_merged_weights
from quantize.convert import copy_companions
from train.fit import Learner

if TYPE_CHECKING:
    from train.config import ModelConfig


def write_merged(learner: Learner, source: Path, output: Path, *, dtype: str, settings: ModelConfig) -> None:
    """Writes `output` as a transformers checkpoint in safetensors, with tokenizer and chat template.

    Args:
        learner: the trained model; its weights are read, not changed.
        source: the model before fine-tuning: config, tokenizer and, under QLoRA, the 16-bit weights.
        dtype: dtype of the merged weights.
        settings: section `model`. With load_in_4bit the live base weights are 4-bit, so W is read from `source`.
    """
    from transformers import AutoConfig, GenerationConfig

    target = getattr(torch, dtype)
    stored = _source_weights(source) if settings.load_in_4bit else None
    save_merged_weights(learner.model, output, target, stored)
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=settings.trust_remote_code)
    config.dtype = target
    config.save_pretrained(output)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(output)
    copy_companions(source, output)


def _source_weights(source: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: weight for path in sorted(source.glob("*.safetensors")) for name, weight in load_file(path).items()}
