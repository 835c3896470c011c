"""One short fine-tuning of a tiny model through `train.fit`, as the pipeline does it, for tests of what a step does.

`python -m fitting unsloth` compares training without QAT and with QAT that never starts, in a process of its own:
unsloth must be imported before transformers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def fit_config(
    backend: str = "peft", scheme: str = "int3", lora: dict[str, Any] | None = None, **fake_quant: Any
) -> Any:
    """Six steps of two rows; unchecked, so that `start` may lie behind the last of them."""
    from train.config import RunConfig

    return RunConfig.model_validate({
        "qat": scheme, "model": {"id": "random", "random": "tiny", "architecture": "qwen3", "backend": backend},
        "data": {"train": "none.jsonl"}, "lora": {"r": 4, **(lora or {})}, "fake_quant": fake_quant,
        "train": {"max_steps": 6, "learning_rate": 1e-2, "max_length": 64, "save_steps": 100},
    })  # fmt: skip


@dataclass
class Fitted:
    """What a fit leaves behind."""

    learner: Any
    losses: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def adapter(self) -> dict[str, Any]:
        """Copies of the adapter's weights and of the ranges' factors."""
        found = {name: p.detach().clone() for name, p in self.learner.model.named_parameters() if ".lora_" in name}
        factors = {} if self.learner.prepared is None else self.learner.prepared.factors
        return found | {f"factor of {name}": factor.detach().clone() for name, factor in factors.items()}


def rows() -> Any:
    """24 random rows of 12 to 30 tokens, the second half of each the answer."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(24):
        length = int(torch.randint(12, 30, (1,), generator=generator))
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        mask = [0] * (length // 2) + [1] * (length - length // 2)
        samples.append({"input_ids": ids, "loss_mask": mask, "row": number + 1})
    return Dataset.from_list(samples)


def fitted(
    config: Any,
    home: Path,
    *,
    qat: bool = True,
    stop_after: int | None = None,
    adapter: Path | None = None,
    teacher: Path | None = None,
) -> Fitted:
    """Trains; continues from the checkpoints that lie in `home` already. Models are made once, beside it."""
    from quantize.schemes import find_scheme
    from train.backends import pick_backend
    from train.fit import QatPlan, build_learner, fit
    from train.models import byte_tokenizer, resolve_model

    backend = pick_backend(config.model.backend)
    source = resolve_model(config.model, cache=home.parent / "models", seed=0).folder
    scheme = find_scheme(config.qat)
    group_size = 32 if scheme.group_sizes else None
    plan = QatPlan(scheme=scheme, target=scheme.find_target("cpu"), group_size=group_size, dtype="float32")
    learner = build_learner(config, backend, source, plan if qat else None, dtype="float32", adapter=adapter)
    result = Fitted(learner)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_after

    def on_step(step: int, steps: int, numbers: dict[str, float]) -> None:
        result.losses.append(numbers["loss"])

    result.finished = fit(
        learner, config, byte_tokenizer(), rows(), home, on_step, should_stop, teacher=teacher
    )  # fmt: skip
    return result


def never_started_is_never_inserted(backend: str, home: Path) -> None:
    """Asserts that losses and weights are equal to the last bit without QAT and with QAT that never starts."""
    from unittest import mock

    import torch

    plain = fitted(fit_config(backend), home / f"plain-{backend}", qat=False)
    for number, asked in enumerate([{}, {"ranges": "mse", "learned_scales": True}, {"distill": 0.5}]):
        config = fit_config(backend, start=99, **asked)
        with mock.patch("train.fit.refuse_late_start"):  # which a run would be refused for
            delayed = fitted(config, home / f"delayed-{backend}-{number}")
        assert delayed.losses == plain.losses and len(plain.losses) == 6
        assert not any(delayed.learner.prepared.calls.values())
        assert delayed.learner.prepared.enabled  # after the fit, for what is measured next
        for name, weight in plain.adapter.items():
            assert torch.equal(weight, delayed.adapter[name]), name
    begun = fitted(fit_config(backend), home / f"begun-{backend}")
    assert begun.losses != plain.losses, "the comparison sees QAT that runs"


if __name__ == "__main__":
    never_started_is_never_inserted(sys.argv[1], Path(sys.argv[2]))
