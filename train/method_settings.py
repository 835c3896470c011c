"""What of the config decides how dpo and grpo train, and what is measured of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.rewards import source_key

if TYPE_CHECKING:
    from train.config import RunConfig


def method_settings(config: RunConfig) -> list[Any]:
    """What dpo or grpo trains with, for a fingerprint; a reward of one's own by its file's content."""
    if config.train.method == "sft":
        return []
    if config.train.method == "dpo":
        return [config.dpo.model_dump()]
    return [config.grpo.model_dump(exclude={"eval_samples"}), _sources(config)]


def _sources(config: RunConfig) -> list[str]:
    """What changes with the code of a reward of one's own."""
    return [source_key(name) for name in config.grpo.rewards]


def measured_by_method(config: RunConfig) -> dict[str, Any] | None:
    """What is measured of every arm besides its loss: see `quantize.jobs.Jobs.method`."""
    asked = config.grpo
    if config.train.method == "dpo":
        return {}
    if config.train.method == "sft" or asked.eval_samples == 0:
        return None
    return {
        "rewards": [_absolute(name) for name in asked.rewards],
        "weights": asked.reward_weights,
        "samples": asked.eval_samples,
        "max_new_tokens": asked.max_completion_length,
        "sources": _sources(config),
    }


def _absolute(name: str) -> str:
    """A reward in a file by its whole path: the run may be finished from another folder."""
    file, colon, function = name.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{function}" if colon and file.endswith(".py") else name
