"""Whether a model is asked for what it was before the fine-tuning: the reference of preference and reward training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def never() -> bool:
    """The answer of a model without an adapter."""
    return False


def reference_asked(model: nn.Module) -> Callable[[], bool]:
    """A question to a PEFT model: is it run as a reference, in place of the adapter that is active now?

    Preference and reward training (DPO, GRPO) measure the policy against the model before it, which PEFT's model gives
    with its adapters disabled, or with a frozen copy of them active. That reference is the 16-bit model: a distribution
    that does not move when fake quantisation is switched on, and whose pull does not hold on to quantisation's error.
    """
    layer: Any = next((module for module in model.modules() if getattr(module, "lora_A", None)), None)
    if layer is None:
        return never
    trained = list(layer.active_adapters)

    def asked() -> bool:
        # With gradients another adapter would be trained, past its fake quantiser: the layers refuse that.
        another = not torch.is_grad_enabled() and layer.active_adapters != trained
        return bool(layer.disable_adapters or another)

    return asked
