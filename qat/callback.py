"""What fake quantisation wants of somebody else's trainer: when it starts, what may be kept, that it really ran."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from qat.head import calls_lm_head
from qat.prepare import Prepared
from qat.schedule import first_step
from quantize.errors import UserError

_MULTIPLY = ("DPOConfig", "GRPOConfig")
"""Of TRL's trainers that multiply by lm_head's weight in the loss, though GRPO's answers call it."""


class QatCallback(TrainerCallback):
    """A callback for transformers' Trainer and for those of TRL that derive from it.

    Nothing is wrong without it, where fake quantisation is on from the first step: it saves time, as weights are merged
    and rounded once for all batches and all generated tokens between two steps, and it fails where a trainer goes past
    a fake-quantised layer.

    Args:
        prepared: what `prepare_qat` gave.
        start: step at which fake quantisation is switched on; below 1 a share of all steps, as `fake_quant.start`.
    """

    def __init__(self, prepared: Prepared, *, start: float = 0.0) -> None:
        self.prepared, self.start = prepared, start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decides what is kept between two steps.

        Raises:
            UserError: `start` lies behind the last step; the ranges are learned, which needs an optimiser of theirs; or
                lm_head is quantised, and the trainer goes past it.
        """
        if first_step(self.start, state.max_steps) >= state.max_steps:
            raise UserError(
                f"QatCallback(start={self.start}): the training ends after {state.max_steps} steps, so that fake "
                "quantisation would never be on; give a share, such as 0.5"
            )
        if args.__class__.__name__.endswith(_MULTIPLY) and self._heads() and not calls_lm_head(self.prepared.model):
            raise UserError(refusal(self._heads()))
        if any(factor.requires_grad for factor in self.prepared.factors.values()):
            raise UserError(
                "prepare_qat(learned_scales=True): a trainer's optimiser does not know the ranges' factors, which "
                "would stay as they are; leave it out, or train with the command `train`"
            )
        # Rewards need many forwards between two steps: one a generated token.
        self.prepared.cache.reuse = args.gradient_accumulation_steps > 1 or hasattr(args, "num_generations")

    def _heads(self) -> list[str]:
        return [name for name in self.prepared.layers if name.rsplit(".", 1)[-1] == "lm_head"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Switches fake quantisation on when its step has come."""
        self.prepared.cache.moved()
        if state.global_step < first_step(self.start, state.max_steps):
            self.prepared.switch_off()
        else:
            self.prepared.switch_on()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drops the weights that the optimiser has moved; those of torch are seen by themselves, others' may not be."""
        self.prepared.cache.moved()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises UserError where a fake-quantised layer has not run: another function would be trained than ships."""
        silent = self.prepared.silent() if self.prepared.enabled else []
        if silent:
            raise UserError(refusal(silent))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves fake quantisation on: what follows sees what ships."""
        self.prepared.cache.moved()
        self.prepared.cache.reuse = False
        self.prepared.switch_on()


def refusal(silent: list[str]) -> str:
    """Why a model with layers that never ran is not trained on, or shipped."""
    head = any(name.rsplit(".", 1)[-1] == "lm_head" for name in silent)
    what = (
        "TRL's trainers read lm_head's weight without calling it: choose a scheme that keeps it in 16 bit, such as "
        "int8-int4, give prepare_qat skip=['lm_head'], or, for DPO and GRPO, use qat.call_lm_head(model) once the "
        "trainer is made"
        if head
        else "something computes them without calling them, such as a fused kernel: switch that off"
    )
    return f"{len(silent)} fake-quantised layers never ran, the first is {silent[0]}: {what}"
