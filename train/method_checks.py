"""Checks of `train.method`: settings that preference pairs and rewards need, and those that they cannot be had with."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from train.config import RunConfig
from train.problems import Problem
from train.trl_fields import dpo_losses

OWN_EXTRA = {
    "dpo": {
        "use_liger_kernel": "nothing: its kernels go past fake quantisers",
        "beta": "dpo.beta",
        "loss_type": "dpo.loss_type",
        "label_smoothing": "dpo.label_smoothing",
        "precompute_ref_log_probs": "nothing: the reference is the same model without its adapter",
        "sync_ref_model": "nothing: the reference is the model before fine-tuning",
        "truncation_mode": "nothing: rows are cut on the right when the data is prepared",
    },
    "grpo": {
        "use_liger_kernel": "nothing: its kernels go past fake quantisers",
        "num_generations": "grpo.num_generations",
        "max_completion_length": "grpo.max_completion_length",
        "temperature": "grpo.temperature",
        "beta": "grpo.beta",
        "reward_weights": "grpo.reward_weights",
        "sync_ref_model": "nothing: the reference is the model before fine-tuning",
        "use_vllm": "nothing: vLLM would answer with 16-bit weights, and the model is trained as it is quantised",
        "use_transformers_continuous_batching": "nothing: it casts the weights that are trained",
        "use_transformers_paged": "nothing: it casts the weights that are trained",
        "cast_lm_head_to_fp32": "model.dtype",
    },
}
"""Fields of TRL's config for a method that ongrid sets itself, and the key to use."""


def method_problems(config: RunConfig) -> Iterator[Problem]:
    """What does not go with dpo or grpo."""
    method, data = config.train.method, config.data
    if method == "sft":
        if data.format == "preference":
            text = "data.format=preference is learned with train.method=dpo; set it, or another data.format"
            yield Problem(("data.format", "train.method"), text)
        return
    if data.packing:
        text = f"data.packing is of train.method=sft alone; set data.packing=false, or leave {method}"
        yield Problem(("data.packing", "train.method"), text)
    if not data.answers_only:
        text = f"data.answers_only=false is of train.method=sft alone: {method} looks at answers; leave it out"
        yield Problem(("data.answers_only", "train.method"), text)
    if config.qat and config.fake_quant.distill > 0:
        text = (
            "fake_quant.distill is of train.method=sft alone: its teacher follows given answers; "
            f"set it to 0, or leave {method}"
        )
        yield Problem(("fake_quant.distill", "train.method"), text)
    if config.lora is not None and "lm_head" in _modules(config.lora.target_modules):
        text = f"lora.target_modules: trl's {method} reads lm_head's weight past an adapter; leave lm_head out"
        yield Problem(("lora.target_modules", "train.method"), text)
    yield from _dpo(config) if method == "dpo" else _grpo(config)


def _modules(asked: str | list[str]) -> list[str]:
    return [asked] if isinstance(asked, str) else [name.rsplit(".", 1)[-1] for name in asked]


def _dpo(config: RunConfig) -> Iterator[Problem]:
    if config.data.format not in ("auto", "preference"):
        text = (
            f"train.method=dpo learns from pairs of answers, which data.format={config.data.format} has not; set auto"
        )
        yield Problem(("train.method", "data.format"), text)
    known, loss = dpo_losses(), config.dpo.loss_type
    if known and loss not in known:
        near = difflib.get_close_matches(loss, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        text = f"dpo.loss_type={loss} is unknown; {hint}choose from {', '.join(known)}"
        yield Problem(("dpo.loss_type",), text)
    if loss == "exo_pair" and config.dpo.label_smoothing == 0:
        text = "dpo.loss_type=exo_pair needs dpo.label_smoothing above 0; its paper recommends 0.001"
        yield Problem(("dpo.loss_type", "dpo.label_smoothing"), text)
    if config.lora is None:
        text = "train.method=dpo with lora=null would need a second copy of the model as its reference; set `lora`"
        yield Problem(("train.method", "lora"), text)


def _grpo(config: RunConfig) -> Iterator[Problem]:
    asked, train = config.grpo, config.train
    if config.model.backend == "unsloth":
        # Measured on an H200: one call of each fake-quantised layer for 8 tokens, and left-padded rows off by nats.
        text = (
            "train.method=grpo needs model.backend=peft: unsloth samples answers past the fake quantisers, and its "
            "kernels count the padding before a prompt"
        )
        yield Problem(("train.method", "model.backend"), text)
    if config.data.format in ("text", "preference"):
        text = (
            f"train.method=grpo needs prompts with an answer to compare, which data.format={config.data.format} has "
            "not; set auto, question_answer, messages, ..."
        )
        yield Problem(("train.method", "data.format"), text)
    if config.lora is None and asked.beta > 0:
        text = "grpo.beta with lora=null would need a second copy of the model as its reference; set `lora`, or beta 0"
        yield Problem(("grpo.beta", "lora"), text)
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if rows % asked.num_generations:
        text = (
            f"grpo.num_generations={asked.num_generations} answers to a prompt do not fit a step of {rows} rows "
            "(train.per_device_train_batch_size * train.gradient_accumulation_steps), which must be a multiple"
        )
        yield Problem(
            ("grpo.num_generations", "train.per_device_train_batch_size", "train.gradient_accumulation_steps"), text
        )
    if not asked.rewards:
        text = "grpo.rewards is empty: nothing would be learned; name exact_match, or file.py:function of your own"
        yield Problem(("grpo.rewards",), text)
    if asked.reward_weights is not None and len(asked.reward_weights) != len(asked.rewards):
        text = f"grpo.reward_weights has {len(asked.reward_weights)} numbers for {len(asked.rewards)} grpo.rewards"
        yield Problem(("grpo.reward_weights", "grpo.rewards"), text)
