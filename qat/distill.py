"""Self-distillation: the teacher is the same model in 16 bit with an adapter of its own, never a second copy of it.

Quantisation-aware distillation matches the output distribution of the unquantised model, which says more about each
token than the token itself (QAD, arXiv 2601.20088). With LoRA the teacher costs one forward pass without gradients, the
memory of one adapter, and the logits of a batch from both.

Shapes: `B` batch, `T` tokens, `V` vocabulary, `N` answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qat.prepare import Prepared


class Teacher:
    """The model with fake quantisation off and other adapter weights.

    Args:
        adapter: parameter name -> weight, as `adapter_weights` gives them; empty = the untouched model.
    """

    def __init__(self, model: Any, prepared: Prepared, adapter: Mapping[str, Tensor]) -> None:
        self.model, self.prepared = model, prepared
        self.adapter = {
            name: adapter[name].to(parameter.device, parameter.dtype) if adapter else torch.zeros_like(parameter)
            for name, parameter in _adapter_parameters(model)
        }

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """(B, T, V) logits for a batch of the trainer, labels left out."""
        was_training = self.model.training
        with self._in_place_of_the_student():
            self.model.eval()
            try:
                given = {name: value for name, value in inputs.items() if name != "labels"}
                output = self.model(**given, use_cache=False)
            finally:
                self.model.train(was_training)
        return output.logits  # type: ignore[no-any-return]

    @contextmanager
    def _in_place_of_the_student(self) -> Iterator[None]:
        was_enabled = self.prepared.enabled
        torch.clear_autocast_cache()  # of a caller's autocast: it holds cast copies by parameter, not by value
        parameters = dict(_adapter_parameters(self.model))
        student = {name: parameter.data for name, parameter in parameters.items()}
        self.prepared.switch_off()
        try:
            for name, parameter in parameters.items():
                parameter.data = self.adapter[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = student[name]
            torch.clear_autocast_cache()
            if was_enabled:
                self.prepared.switch_on()


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """A copy of the adapter's weights by parameter name."""
    return {name: parameter.detach().clone() for name, parameter in _adapter_parameters(model)}


def _adapter_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name)


def answer_divergence(student: Tensor, teacher: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """KL(teacher || student) on the answer tokens, summed and divided by `count`, in nats.

    Args:
        student, teacher: (B, T, V) logits; position t predicts token t + 1.
        labels: (B, T), -100 where a token is no answer.
        count: answer tokens of all batches of the step, as the trainer's own loss divides; None = of this batch.
    """
    wanted = labels[:, 1:] != -100
    expected = torch.log_softmax(teacher[:, :-1][wanted].float(), dim=-1)  # (N, V)
    given = torch.log_softmax(student[:, :-1][wanted].float(), dim=-1)
    total = torch.nn.functional.kl_div(given, expected, reduction="sum", log_target=True)
    return total / (wanted.sum() if count is None else count)
