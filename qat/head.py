"""Log-probabilities of answers through lm_head as it is, fake-quantised or not, for TRL's trainers of policies.

Shapes: `B` rows, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def call_lm_head(model: Any, temperature: float = 1.0) -> None:
    """Makes the model call lm_head where TRL's DPO and GRPO trainers multiply by its weight; they are built before it.

    TRL's way goes past a fake quantiser of lm_head, and needs triton. This one holds the logits (B, T, V).

    Args:
        model: a transformers model, or PEFT's around one, that was given to a trainer.
        temperature: of GRPO's trainer, by which logits are divided.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = base.forward

    @functools.wraps(forward)
    def called(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, labels=labels, **kwargs)
        kwargs.pop("use_cache", None)
        output = forward(*args, use_cache=False, **kwargs)
        wanted = labels[:, 1:]
        mask = wanted != -100
        logits = output.logits[:, :-1].float() / temperature
        scores = torch.log_softmax(logits, dim=-1)
        chosen = scores.gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        entropy = -(scores.exp() * scores).sum(-1)
        with torch.no_grad():
            is_top1 = logits.argmax(-1) == wanted
            mean_logits = logits.mean(-1)
            log_sum_sq_probs = torch.logsumexp(2 * scores, dim=-1)
        log_probs = chosen.masked_fill(~mask, 0.0)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs,
            entropy=entropy.masked_fill(~mask, 0.0),
            log_sum_sq_probs=log_sum_sq_probs.masked_fill(~mask, 0.0),
            mean_logits=mean_logits.masked_fill(~mask, 0.0),
            is_top1=is_top1 & mask,
            label_mask=mask,
            aux_loss=getattr(output, "aux_loss", None),
        )

    called.calls_lm_head = True  # type: ignore[attr-defined]
    base.forward = called


def calls_lm_head(model: Any) -> bool:
    """Whether `call_lm_head` was applied."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return hasattr(base.forward, "calls_lm_head")
