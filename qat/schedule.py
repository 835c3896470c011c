"""When fake quantisation is on, and what of it must survive a stop: the ranges' factors and the teacher's adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.distill import Teacher, adapter_weights
from qat.prepare import Prepared

_FACTORS, _TEACHER = "range_factors.safetensors", "teacher.safetensors"


def first_step(start: float, steps: int) -> float:
    """How many of `steps` pass before fake quantisation is switched on, for a start as a step or as a share.

    A share always leaves a step with it on.
    """
    if not 0 < start < 1:
        return start
    return min(math.ceil(start * steps - 1e-9), steps - 1)  # 0.07 * 100 is a little above 7


class Schedule:
    """Switches fake quantisation on at its step and keeps the teacher.

    Args:
        start: step at which it is switched on; below 1 a share of all steps.
        adapter: the teacher's adapter; None = the run's own as it is at the start.
        distill: share of the loss that is the divergence from the teacher; 0 needs no teacher.
        folder: where the teacher of a delayed start is kept for a resume.
    """

    def __init__(
        self,
        model: Any,
        prepared: Prepared,
        *,
        start: float,
        distill: float = 0.0,
        adapter: Mapping[str, Tensor] | None = None,
        folder: Path,
    ) -> None:
        self.model, self.prepared, self.start, self.distill, self.folder = model, prepared, start, distill, folder
        self.adapter = adapter
        self.teacher: Teacher | None = None

    def before_step(self, step: int, steps: int) -> bool:
        """Prepares for the step that follows `step` finished ones, of `steps`. True when something was switched."""
        first = first_step(self.start, steps)
        was_enabled = self.prepared.enabled
        if step < first:
            self.prepared.switch_off()
        else:
            if self.distill > 0 and self.teacher is None:
                self.teacher = self._find_teacher(begun=step > first)
            self.prepared.switch_on()
        return was_enabled != self.prepared.enabled

    def _find_teacher(self, *, begun: bool) -> Teacher:
        from safetensors.torch import load_file, save_file

        kept = self.folder / _TEACHER
        adapter = self.adapter
        if adapter is None and begun and kept.is_file():
            adapter = load_file(kept)
        elif adapter is None:
            adapter = adapter_weights(self.model)
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(".tmp")
            save_file({name: weight.contiguous().cpu() for name, weight in adapter.items()}, temporary)
            temporary.replace(kept)
        return Teacher(self.model, self.prepared, adapter)


def save_factors(prepared: Prepared | None, folder: Path) -> None:
    """Writes the ranges' factors beside a checkpoint, once they have been chosen."""
    from safetensors.torch import save_file

    if prepared is not None and prepared.factors and (prepared.ranges_chosen or not prepared.mse):
        factors = {name: factor.detach().cpu().contiguous() for name, factor in prepared.factors.items()}
        save_file(factors, folder / _FACTORS)


def load_factors(prepared: Prepared | None, folder: Path) -> None:
    """Takes what `save_factors` wrote, where it did."""
    from safetensors.torch import load_file

    if prepared is not None and (folder / _FACTORS).is_file():
        prepared.load_factors(load_file(folder / _FACTORS))
