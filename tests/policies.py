"""Rows, settings and the plain definition of log-probabilities, for tests of DPO and GRPO on a CPU and on a GPU."""

from __future__ import annotations

import json
from typing import Any

import torch
from datasets import Dataset
from fitting import fit_config, rows

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def pairs() -> Any:
    """The rows, each with the answer of another as its worse one."""
    found = list(rows())
    for row, other in zip(found, [*found[1:], found[0]], strict=True):
        prompt, answer = row["loss_mask"].count(0), other["input_ids"][other["loss_mask"].count(0) :]
        row["rejected_ids"] = row["input_ids"][:prompt] + answer
        row["rejected_mask"] = [0] * prompt + [1] * len(answer)
    return Dataset.from_list(found)


def prompts() -> Any:
    return Dataset.from_list(
        [
            {
                "prompt": json.dumps([{"role": "user", "content": f"{number} and"}]),
                "answer": str(number),
                "columns": json.dumps({"kind": "count"}),
                "input_ids": [5, 6, 7, 8],
                "loss_mask": [0, 0, 1, 1],
                "row": number + 1,
            }
            for number in range(16)
        ]
    )


def config_of(method: str, scheme: str = "int8-int4", **more: Any) -> Any:
    config = fit_config(scheme=scheme, start=0)
    train = config.train.model_copy(update={"method": method, "per_device_train_batch_size": 4, **more})
    grpo = config.grpo.model_copy(update={"num_generations": 4, "max_completion_length": 6, "temperature": 0.7})
    return config.model_copy(update={"train": train, "grpo": grpo})


def log_probs(model: Any, batch: dict[str, Any], temperature: float = 1.0) -> torch.Tensor:
    """(B, T - 1) log-probability of each token from those before, by the plain definition."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    scores = torch.log_softmax(logits[:, :-1] / temperature, dim=-1)
    return scores.gather(-1, batch["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
