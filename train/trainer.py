"""TRL's trainer of each `train.method` as a run uses it: supervised, and what all of them share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.distill import answer_divergence
from quantize.errors import UserError
from train.collators import Collator, PackedCollator, pack, with_labels

if TYPE_CHECKING:
    from torch import Tensor

    from qat.schedule import Schedule
    from train.config import RunConfig
    from train.fit import Learner


def build_trainer(
    learner: Learner, config: RunConfig, tokenizer: Any, dataset: Any, folder: Path, schedule: Schedule | None
) -> Any:
    """TRL's trainer over the rows, whose loss must be finite.

    Args:
        dataset: rows as `RowReader.read` makes them for the method.
        folder: where it keeps its checkpoints.
        schedule: of fake quantisation; with a teacher there is distillation (sft alone).
    """
    from train.policy import dpo_trainer, grpo_trainer

    arguments = trainer_arguments(config, folder, bf16=learner.autocasts)
    if config.train.method == "dpo":
        trainer = dpo_trainer(learner, config, arguments, tokenizer, dataset)
    elif config.train.method == "grpo":
        trainer = grpo_trainer(learner, config, arguments, tokenizer, dataset)
    else:
        trainer = _sft_trainer(learner, config, arguments, tokenizer, dataset, schedule)
    # The backend may have changed the arguments under way.
    if trainer.args.bf16 != learner.autocasts:
        raise UserError(
            f"{config.model.backend} would train with bf16={trainer.args.bf16}, where model.dtype={learner.dtype} asks "
            f"for bf16={learner.autocasts}; set model.backend=peft or another model.dtype"
        )
    return trainer


def trainer_class(base: Any, learner: Learner, config: RunConfig) -> Any:
    """`base`, a trainer of TRL, with the ranges' optimiser and a loss that must be finite.

    Made when it is needed: the backend must have patched trl.
    """

    class Trainer(base):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rows = inputs.pop("rows", None)
            result = self.method_loss(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            if not math.isfinite(loss.item()):
                at = f"the loss is {loss.item()} at step {self.state.global_step + 1}"
                if rows is None:
                    raise UserError(f"{at}; lower train.learning_rate or set train.max_grad_norm")
                raise UserError(
                    f"{at}, on the data rows {rows.tolist()}; lower train.learning_rate, set train.max_grad_norm, or "
                    "look at those rows"
                )
            return result

        def method_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **kwargs)

        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            learned = [] if learner.prepared is None else list(learner.prepared.factors.values())
            if learned and learned[0].requires_grad and not any(learned[0] is p for p in _parameters(optimizer)):
                rate = config.fake_quant.scale_learning_rate
                optimizer.add_param_group({"params": learned, "lr": rate, "weight_decay": 0.0})
            return optimizer

    return Trainer


def _sft_trainer(
    learner: Learner, config: RunConfig, arguments: Any, tokenizer: Any, dataset: Any, schedule: Schedule | None
) -> Any:
    """On answers, packed where asked for."""
    import transformers
    from trl import SFTTrainer

    class Trainer(trainer_class(SFTTrainer, learner, config)):  # type: ignore[misc]
        def method_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # TRL's own loss needs triton; transformers' is the same function and runs everywhere. It also lets
            # the backend's fused cross entropy work, which sits in the model's forward.
            if schedule is not None and schedule.teacher is not None:
                return self.distilled_loss(model, inputs, schedule.teacher.logits(inputs), **kwargs)
            return transformers.Trainer.compute_loss(self, model, inputs, *args, **kwargs)

        def distilled_loss(self, model: Any, inputs: dict[str, Any], expected: Tensor, **kwargs: Any) -> Any:
            share, count = config.fake_quant.distill, kwargs.get("num_items_in_batch")
            labels = inputs["labels"]  # label smoothing takes them out
            loss, output = transformers.Trainer.compute_loss(
                self, model, inputs, return_outputs=True, num_items_in_batch=count
            )
            divergence = answer_divergence(output.logits, expected, labels, count)
            return (1 - share) * loss + share * divergence

    rows = with_labels(dataset)
    collator: Collator | PackedCollator = Collator(tokenizer.pad_token_id)
    if config.data.packing:
        rows = pack(rows, config.train.max_length)
        collator = PackedCollator(name_lengths=config.model.backend == "unsloth")
    return Trainer(
        model=learner.model, args=arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer
    )


def trainer_arguments(config: RunConfig, folder: Path, *, bf16: bool) -> Any:
    """TRL's SFTConfig, DPOConfig or GRPOConfig for this run; `bf16` asks for autocast."""
    import torch
    import trl

    from train.trl_fields import config_name

    settings = config.train.model_dump(exclude={"extra", "method"})
    cuda = torch.cuda.is_available()
    gradient_checkpointing = settings.pop("gradient_checkpointing")
    settings |= {
        "output_dir": str(folder),
        "seed": config.run.seed,
        "data_seed": config.run.seed,
        "bf16": bf16,
        "use_cpu": not cuda,
        # The backend turns it on where the model is loaded: unsloth has its own.
        "gradient_checkpointing": gradient_checkpointing and config.model.backend == "unsloth" and cuda,
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "save_only_model": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
    }
    del settings["max_length"]  # truncated when the data was prepared
    arguments = getattr(trl, config_name(config.train.method))(
        **{**settings, **_method_arguments(config), **config.train.extra}
    )
    # A process trains on one GPU. With several in sight the trainer would copy the model to each (DataParallel), where
    # fake quantisation is not: its forwards are bound to the layers of this one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _method_arguments(config: RunConfig) -> dict[str, Any]:
    if config.train.method == "dpo":
        return {**config.dpo.model_dump(), "max_length": None}
    if config.train.method == "grpo":
        return config.grpo.model_dump(exclude={"rewards", "eval_samples"})
    # The rows come packed.
    return {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}


def _parameters(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
