"""One fine-tuning: model and adapters through a backend, fake quantisation, TRL's trainer, checkpoints, resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.prepare import Prepared, prepare_qat
from quantize.errors import UserError
from quantize.evaluate import Sample, batches
from quantize.schemes import Scheme, Target
from train.backends import Backend, initialise_adapters
from train.collators import Collator, PackedCollator, pack, with_labels

if TYPE_CHECKING:
    from train.config import RunConfig

OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class QatPlan:
    """The format to train for. `dtype` is that of the merged weight ("float32", "bfloat16")."""

    scheme: Scheme
    target: Target
    group_size: int | None
    dtype: str


@dataclass(kw_only=True)
class Learner:
    """A model in training form, with or without fake quantisation; `dtype` is that of its weights ("bfloat16")."""

    model: Any
    prepared: Prepared | None
    dtype: str

    @property
    def autocasts(self) -> bool:
        """Whether training runs under bf16 autocast: on CUDA, unless the weights are asked for in float32."""
        import torch

        return torch.cuda.is_available() and self.dtype == "bfloat16"

    @property
    def fake_quantised(self) -> tuple[str, ...]:
        """Names of the fake-quantised layers."""
        return self.prepared.coverage.layers if self.prepared else ()


def build_learner(
    config: RunConfig, backend: Backend, folder: Path, plan: QatPlan | None, *, dtype: str, adapter: Path | None = None
) -> Learner:
    """Loads the model, adds LoRA and fake quantisation.

    Args:
        folder: the model as resolved.
        plan: None trains without fake quantisation.
        dtype: dtype of the weights in training.
        adapter: weights of a finished fit to load.
    """
    import torch

    source = folder if adapter is None or config.lora is not None else adapter
    model = backend.load(
        source, config.model, dtype=dtype, max_length=config.train.max_length, full=config.lora is None
    )
    if config.lora is not None:
        model = backend.add_lora(
            model, config.lora, seed=config.run.seed, gradient_checkpointing=config.train.gradient_checkpointing
        )
        initialise_adapters(model, config.run.seed)
        if adapter is not None:
            _load_adapter(model, adapter)
    elif config.train.gradient_checkpointing and backend.name == "peft":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prepared = None
    if plan is not None:
        prepared = prepare_qat(
            model,
            plan.scheme,
            target=plan.target,
            group_size=plan.group_size,
            dtype=getattr(torch, plan.dtype),
            placement=config.fake_quant.placement,
        )
        share = prepared.coverage.quantized_fraction
        if share < config.fake_quant.min_coverage:
            first = "; ".join(f"{name}: {reason}" for name, reason in list(prepared.coverage.skipped.items())[:3])
            raise UserError(
                f"{plan.scheme.name} reaches {share:.1%} of the linear weights, below fake_quant.min_coverage="
                f"{config.fake_quant.min_coverage} ({first}); choose another quantize.group_size or lower the bound"
            )
    return Learner(model=model, prepared=prepared, dtype=dtype)


def save_adapter(learner: Learner, folder: Path) -> None:
    """Writes the adapter (peft's format), or the full weights where there is none."""
    learner.model.save_pretrained(folder)


def _load_adapter(model: Any, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert not result.unexpected_keys, f"{folder} holds weights that this model lacks: {result.unexpected_keys[:3]}"


def fit(
    learner: Learner,
    config: RunConfig,
    tokenizer: Any,
    dataset: Any,
    folder: Path,
    on_step: OnStep,
    should_stop: Callable[[], bool],
) -> bool:
    """Trains until the end, or until `should_stop`; continues from the last checkpoint in `folder`.

    Args:
        dataset: columns input_ids, loss_mask, row.
        folder: where the trainer keeps its checkpoints.
        on_step: called with (step, all steps, logged numbers) whenever the trainer logs.
        should_stop: asked after every step; true saves the state and ends.

    Returns:
        True when finished, False when stopped.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    trainer = _build_trainer(learner, config, tokenizer, dataset, folder)
    stop = _StopCallback(learner, config.fake_quant.start, on_step, should_stop)
    trainer.add_callback(stop)
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return not stop.stopped


def _build_trainer(learner: Learner, config: RunConfig, tokenizer: Any, dataset: Any, folder: Path) -> Any:
    """TRL's trainer over the rows, packed where asked for, whose loss must be finite."""
    import transformers
    from trl import SFTTrainer

    class Trainer(SFTTrainer):  # defined here: the backend must have patched trl
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # TRL's own loss needs triton; transformers' is the same function and runs everywhere. It also lets
            # the backend's fused cross entropy work, which sits in the model's forward.
            rows = inputs.pop("rows")
            result = transformers.Trainer.compute_loss(self, model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1}, on the data rows "
                    f"{rows.tolist()}; lower train.learning_rate, set train.max_grad_norm, or look at those rows"
                )
            return result

    rows = with_labels(dataset)
    collator: Collator | PackedCollator = Collator(tokenizer.pad_token_id)
    if config.data.packing:
        rows = pack(rows, config.train.max_length)
        collator = PackedCollator(name_lengths=config.model.backend == "unsloth")
    trainer = Trainer(
        model=learner.model,
        args=trainer_arguments(config, folder, bf16=learner.autocasts),
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer,
    )
    # The backend may have changed the arguments under way.
    if trainer.args.bf16 != learner.autocasts:
        raise UserError(
            f"{config.model.backend} would train with bf16={trainer.args.bf16}, where model.dtype={learner.dtype} asks "
            f"for bf16={learner.autocasts}; set model.backend=peft or another model.dtype"
        )
    return trainer


def trainer_arguments(config: RunConfig, folder: Path, *, bf16: bool) -> Any:
    """TRL's SFTConfig for this run; `bf16` asks for autocast."""
    import torch
    from trl import SFTConfig

    settings = config.train.model_dump(exclude={"extra"})
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
        "packing": False,  # the rows come packed
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
        "max_length": None,  # truncated when the data was prepared
    }
    return SFTConfig(**{**settings, **config.train.extra})


def _StopCallback(learner: Learner, start: float, on_step: OnStep, should_stop: Callable[[], bool]) -> Any:
    import transformers

    class Callback(transformers.TrainerCallback):
        stopped = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if learner.prepared is not None:
                first = start * state.max_steps if 0 < start < 1 else start
                learner.prepared.switch.enabled = state.global_step >= first

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _check_that_it_ran(learner)
            if should_stop() and state.global_step < state.max_steps:
                self.stopped = control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            numbers = {name: float(value) for name, value in (logs or {}).items() if _is_number(value)}
            if "loss" in numbers:
                on_step(state.global_step, state.max_steps, numbers)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if learner.prepared is not None:
                learner.prepared.switch.enabled = True

    return Callback()


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _check_that_it_ran(learner: Learner) -> None:
    """Fails when a fused path of the backend went past a fake quantiser: the run would train another function."""
    prepared = learner.prepared
    if prepared is None or not prepared.switch.enabled:
        return
    silent = set(prepared.coverage.layers) - prepared.switch.seen
    if silent:
        raise UserError(
            f"{len(silent)} fake-quantised layers never ran, the first is {sorted(silent)[0]}: the backend computes "
            "them without calling them; set model.backend=peft"
        )


def backend_loss(learner: Learner, samples: Sequence[Sample], batch_size: int) -> float:
    """Nats per answer token in the training backend's own graph, eval mode, same batches as the plain evaluation."""
    import torch

    model = learner.model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=learner.autocasts):
        for _, ids, attention, mask in batches(samples, batch_size):
            labels = ids.masked_fill(~mask, -100).to(device)
            output = model(input_ids=ids.to(device), attention_mask=attention.to(device), labels=labels)
            count = int(mask.sum())
            total += float(output.loss) * count
            tokens += count
    return total / tokens
