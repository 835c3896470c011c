"""TRL's loss in plain torch: its own is a Triton kernel, so that its stock trainers need a GPU. The rest is TRL's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PlainLogProbs:
    """Stands in for `trl.kernels.ChunkedLogProbFunction`: the same arguments and outputs, by autograd."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk: int,
        softcapping: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Hidden (N, I), weight (V, I), labels (N,) -> log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1."""
        assert softcapping is None
        logits = torch.nn.functional.linear(hidden, weight, bias).float() * scale / temperature
        everything = torch.log_softmax(logits, -1)
        found: dict[str, Any] = {
            "log_probs": everything.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
            "entropy": -(everything.exp() * everything).sum(-1),
            "log_sum_sq_probs": torch.logsumexp(2 * everything, -1).detach(),
            "mean_logits": logits.mean(-1).detach(),
            "is_top1": logits.argmax(-1) == labels,
        }
        return tuple(value if name in outputs else None for name, value in found.items())
