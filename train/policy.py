"""TRL's trainers for preferences (DPO) and rewards (GRPO), whose policy is the model as it is quantised.

Their reference is the model before fine-tuning, in 16 bit (`qat.reference`), so that it stays the same when
quantisation starts later. Answers of GRPO are sampled from the quantised model.

Shapes: `B` rows, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qat.head import call_lm_head
from quantize.rewards import load_rewards
from train.collators import PairCollator
from train.trainer import trainer_class

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.fit import Learner


def dpo_trainer(learner: Learner, config: RunConfig, arguments: Any, tokenizer: Any, dataset: Any) -> Any:
    """DPO over rows with a second answer (rejected_ids, rejected_mask)."""
    from trl import DPOTrainer

    class Trainer(trainer_class(DPOTrainer, learner, config)):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # tokenised, with masks that no template can move

    trainer = Trainer(
        model=learner.model,
        args=arguments,
        train_dataset=dataset,
        data_collator=PairCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    return _as_quantised(trainer, learner, temperature=1.0)


def grpo_trainer(learner: Learner, config: RunConfig, arguments: Any, tokenizer: Any, dataset: Any) -> Any:
    """GRPO over prompts, with this run's rewards."""
    from datasets import Dataset
    from trl import GRPOTrainer

    rows = [
        {"prompt": json.loads(row["prompt"]), "answer": row["answer"], **json.loads(row["columns"])} for row in dataset
    ]
    if learner.prepared is not None:
        # An answer reads every weight once a token, and none of them moves until the step.
        learner.prepared.cache.reuse = True
    trainer = trainer_class(GRPOTrainer, learner, config)(
        model=learner.model,
        reward_funcs=list(load_rewards(config.grpo.rewards)),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return _as_quantised(trainer, learner, temperature=arguments.temperature)


def _as_quantised(trainer: Any, learner: Learner, *, temperature: float) -> Any:
    """The trainer, with the reference and the head that fake quantisation needs."""
    import torch

    model = learner.model
    if "ref" in getattr(model, "peft_config", {}):
        # TRL's copy of the fresh adapter, which would lie in every checkpoint: without it, it disables the adapter.
        model.delete_adapter("ref")
    prepared = learner.prepared
    if not torch.cuda.is_available() or (prepared is not None and "lm_head" in prepared.layers):
        call_lm_head(model, temperature)
    return trainer
