"""One fine-tuning: model and adapters through a backend, fake quantisation, TRL's trainer, checkpoints, resume."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.adapters import refuse_unmergeable
from qat.prepare import Prepared, prepare_qat
from qat.schedule import Schedule, load_factors, save_factors
from quantize.errors import UserError
from quantize.evaluate import Sample, batches
from quantize.schemes import Scheme, Target
from train.backends import Backend, initialise_adapters
from train.refusals import refuse_late_start, refuse_low_coverage
from train.trainer import build_trainer

if TYPE_CHECKING:
    from torch import Tensor

    from train.config import RunConfig

_LEAST_FACTOR = 0.05
"""Of a learned range: below it a group would all but vanish, and its gradient with it."""
_COMPLETE = "complete"
"""The last file of a checkpoint, after the trainer's own and the ranges' factors."""
OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class QatPlan:
    """The format to train for.

    Attributes:
        skip: names, blocks or patterns of the layers that stay in 16 bit.
        dtype: what the shipped model computes in ("float32", "bfloat16").
    """

    scheme: Scheme
    target: Target
    group_size: int | None
    skip: tuple[str, ...] = ()
    dtype: str


@dataclass(kw_only=True)
class Learner:
    """A model in training form, with or without fake quantisation.

    Attributes:
        dtype: that of its weights ("bfloat16").
    """

    model: Any
    prepared: Prepared | None
    dtype: str
    backend: Backend

    @property
    def autocasts(self) -> bool:
        """Whether training runs under bf16 autocast: on CUDA, unless the weights are asked for in float32."""
        import torch

        return torch.cuda.is_available() and self.dtype == "bfloat16"

    def computing(self, *, logits: bool = False) -> AbstractContextManager[None]:
        """Held while the model runs as it is at the moment, with fake quantisation on or off.

        Args:
            logits: the model must give them in training too, where a backend would leave them out.
        """
        on = self.prepared is not None and self.prepared.enabled
        names = tuple(self.prepared.layers) if self.prepared is not None and on else ()
        return self.backend.computing(names, dtype=self.dtype, logits=logits)


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
        refuse_unmergeable(model)
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
            skip=plan.skip,
            dtype=getattr(torch, plan.dtype),
            placement=config.fake_quant.placement,
            ranges=config.fake_quant.ranges,
            learned_scales=config.fake_quant.learned_scales,
            enabled=config.fake_quant.starts_at == 0,
            fused=config.fake_quant.fused,
            cache_mib=config.fake_quant.cache_mib,
        )
        prepared.cache.reuse = config.train.gradient_accumulation_steps > 1
        refuse_low_coverage(prepared.coverage, plan.scheme, config.fake_quant.min_coverage)
        if adapter is not None:
            load_factors(prepared, adapter)
    return Learner(model=model, prepared=prepared, dtype=dtype, backend=backend)


def save_adapter(learner: Learner, folder: Path) -> None:
    """Writes the adapter (peft's format), or the full weights where there is none, and the ranges' factors."""
    learner.model.save_pretrained(folder)
    save_factors(learner.prepared, folder)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Parameter name -> weight of an adapter that `save_adapter` wrote."""
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter_model.safetensors")
    return {name.removesuffix(".weight") + ".default.weight": weight for name, weight in stored.items()}


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
    *,
    teacher: Path | None = None,
) -> bool:
    """Trains until the end, or until `should_stop`; continues from the last checkpoint in `folder`.

    Args:
        dataset: columns input_ids, loss_mask, row.
        folder: where the trainer keeps its checkpoints.
        on_step: called with (step, all steps, logged numbers) whenever the trainer logs.
        should_stop: asked after every step; true saves the state and ends.
        teacher: the adapter of the finished 16-bit fine-tune, where `fake_quant.teacher` asks for it.

    Returns:
        True when finished, False when stopped.

    Raises:
        UserError: the loss is NaN or infinite; `fake_quant.start` lies behind the last step.
    """
    import transformers

    schedule = _schedule(learner, config, folder, teacher)
    with learner.computing():  # unsloth reads whether to autocast when the trainer is made, too
        trainer = build_trainer(learner, config, tokenizer, dataset, folder, schedule)
    last = last_checkpoint(folder)
    if last is not None:
        load_factors(learner.prepared, last)
    _rehearse(learner, dataset)
    with ExitStack() as contexts:
        callback = _callback(learner, schedule, contexts, on_step, should_stop)
        trainer.add_callback(callback)
        trainer.remove_callback(transformers.ProgressCallback)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if learner.prepared is not None and not callback.stopped:
        learner.prepared.switch_on()
    return not callback.stopped


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of `folder` that was written to its end; newer ones, cut short by a kill, are removed."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if (path / _COMPLETE).is_file():
            return path
        shutil.rmtree(path)
    return None


def _schedule(learner: Learner, config: RunConfig, folder: Path, teacher: Path | None) -> Schedule | None:
    if learner.prepared is None:
        return None
    asked = config.fake_quant
    adapter: dict[str, Tensor] | None = {} if asked.teacher == "base" else None
    if asked.teacher == "control" and asked.distill > 0:
        assert teacher is not None
        adapter = read_adapter(teacher)
    return Schedule(
        learner.model, learner.prepared, start=asked.starts_at, distill=asked.distill, adapter=adapter, folder=folder
    )


def _callback(
    learner: Learner, schedule: Schedule | None, contexts: ExitStack, on_step: OnStep, should_stop: Callable[[], bool]
) -> Any:
    """Runs the schedule, checks that fake quantisation ran, stops when asked, and hands the logged numbers on.

    Args:
        contexts: holds the backend's settings, which change when fake quantisation is switched.
    """
    import transformers

    class Callback(transformers.TrainerCallback):
        stopped = began = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if schedule is not None:
                refuse_late_start(schedule.start, state.max_steps)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if learner.prepared is not None:
                learner.prepared.cache.moved()
            switched = schedule is not None and schedule.before_step(state.global_step, state.max_steps)
            if switched or not self.began:
                contexts.close()
                taught = schedule is not None and schedule.teacher is not None
                contexts.enter_context(learner.computing(logits=taught))
            self.began = True

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if learner.prepared is not None:
                learner.prepared.cache.moved()  # here too: an evaluation may follow the last step
                # They are no parameters of the model, whose gradients the trainer clears.
                for factor in learner.prepared.factors.values():
                    factor.grad = None
                    factor.data.clamp_(min=_LEAST_FACTOR)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _check_that_it_ran(learner)
            if should_stop() and state.global_step < state.max_steps:
                self.stopped = control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_factors(learner.prepared, checkpoint)
            (checkpoint / _COMPLETE).touch()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            numbers = {name: float(value) for name, value in (logs or {}).items() if _is_number(value)}
            if "loss" in numbers:
                on_step(state.global_step, state.max_steps, numbers)

    return Callback()


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _rehearse(learner: Learner, dataset: Any) -> None:
    """Computes one row with fake quantisation that starts later: what would fail then fails before any training."""
    if learner.prepared is None or learner.prepared.enabled:
        return
    with learner.prepared.trial():
        backend_loss(learner, [Sample(dataset[0]["input_ids"], dataset[0]["loss_mask"])], batch_size=1)
        _check_that_it_ran(learner)


def _check_that_it_ran(learner: Learner) -> None:
    """Fails when a fused path of the backend went past a fake quantiser: the run would train another function."""
    prepared = learner.prepared
    if prepared is None or not prepared.enabled:
        return
    silent = prepared.silent()
    if silent:
        raise UserError(
            f"{len(silent)} fake-quantised layers never ran, the first is {silent[0]}: the backend computes "
            "them without calling them; set model.backend=peft"
        )


def backend_loss(learner: Learner, samples: Sequence[Sample], batch_size: int) -> float:
    """Nats per answer token in the training backend's own graph, eval mode, same batches as the plain evaluation.

    Without the loss that balances a router's load, which trl adds in training.
    """
    import torch

    model = learner.model.eval()
    device = next(model.parameters()).device
    routed = getattr(model.config.get_text_config(), "output_router_logits", False)
    options = {"output_router_logits": False} if routed else {}
    total, tokens = 0.0, 0
    with torch.no_grad(), learner.computing(), torch.autocast("cuda", torch.bfloat16, enabled=learner.autocasts):
        for _, ids, attention, mask in batches(samples, batch_size):
            labels = ids.masked_fill(~mask, -100).to(device)
            output = model(input_ids=ids.to(device), attention_mask=attention.to(device), labels=labels, **options)
            count = int(mask.sum())
            total += float(output.loss) * count
            tokens += count
    return total / tokens
