"""What is refused before anything is trained, once the shape of the model or the number of steps is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.adapters import refuse_unmergeable
from qat.schedule import first_step
from quantize.errors import UserError
from quantize.layers import Coverage
from quantize.schemes import Scheme

if TYPE_CHECKING:
    from torch import nn

    from train.config import RunConfig


def refuse_low_coverage(coverage: Coverage, scheme: Scheme, least: float) -> None:
    """Raises UserError, with the layers and why they are left out, where too few weights would be quantised."""
    share = coverage.reached_fraction
    if not coverage.layers:
        reasons = "; ".join(sorted(set(coverage.skipped.values()))) or "it has no linear layer"
        raise UserError(f"{scheme.name} reaches no layer of this model: {reasons}")
    if share < least:
        left = {name: reason for name, reason in coverage.skipped.items() if name.rsplit(".", 1)[-1] not in scheme.skip}
        first = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UserError(
            f"{scheme.name} reaches {share:.1%} of the weights, below fake_quant.min_coverage={least} "
            f"({first}{more}); lower the bound, or choose another quantize.group_size where that is the reason"
        )


def refuse_misplaced_adapters(shape: nn.Module, config: RunConfig) -> None:
    """Adds the adapters to a model without weights (meta device), to find before training where they do not fit.

    Raises:
        UserError: `lora.target_modules` names nothing in the model, or layers whose adapters cannot be merged.
    """
    import peft

    from train.backends.peft import lora_settings

    assert config.lora is not None
    unsloth = config.model.backend == "unsloth"
    if unsloth and config.lora.target_modules == "all-linear" and not config.lora.target_parameters:
        return  # unsloth is given the linear layers' names
    try:
        wrapped = peft.get_peft_model(shape, lora_settings(config.lora, shape))
    except ValueError as error:
        on = f" and lora.target_parameters={config.lora.target_parameters}" if config.lora.target_parameters else ""
        raise UserError(f"lora.target_modules={config.lora.target_modules}{on}: {error}") from error
    refuse_unmergeable(wrapped)


def refuse_late_start(start: float, steps: int) -> None:
    """Raises UserError where a fine-tuning of so many steps ends before fake quantisation is switched on."""
    if first_step(start, steps) >= steps:
        raise UserError(f"fake_quant.start={start} would never be reached: the fine-tuning has {steps} steps")
