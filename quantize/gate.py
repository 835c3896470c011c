"""The gate of a run: the function that was trained is the function that ships, within the bound of its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantize.layer_health import compare_outputs
from quantize.layers import modules_of
from quantize.schemes import Scheme, Target


def check_gap(
    gap: float, scheme: Scheme, target: Target, find_worst: Callable[[], Sequence[tuple[str, float]]]
) -> None:
    """Lets a run pass whose trained and shipped losses differ by no more than the target's bound.

    Args:
        gap: trained minus shipped, nats a token, both in the plain graph on the same batches.
        find_worst: called only where the gap is too large; (layer, relative difference), the worst first.

    Raises:
        RuntimeError: the gap is larger, with the layers that differ most.
    """
    if abs(gap) <= target.max_gap_nats:
        return
    worst = [(name, difference) for name, difference in find_worst() if difference > 0]
    where = "; ".join(f"{name}: {difference:.2%} of its norm" for name, difference in worst[:3])
    raise RuntimeError(
        f"the trained function and the shipped one differ by {gap:+.6f} nats a token, more than {target.max_gap_nats} "
        f"for {scheme.name} on {target.name}: the run is not finished. These differ most, layers by their output on "
        f"equal inputs, 16-bit weights by themselves: {where or 'none'}. Please report it"
    )


def layer_differences(
    trained: nn.Module, shipped: nn.Module, layers: Sequence[str], inputs: Mapping[str, Any]
) -> list[tuple[str, float]]:
    """How far each real layer is from its simulation on the inputs that the simulation sees, the worst first.

    Args:
        trained: the simulation in the plain graph. shipped: the checkpoint reloaded from disk.
        layers: names of the quantised layers. inputs: a batch, as the models' forward takes it.

    Returns:
        (layer, |real - simulated| / |simulated|), Euclidean norms over the batch.
    """
    found: dict[str, float] = {}

    def visit(name: str, given: Tensor, simulated: Tensor, real: Tensor) -> None:
        scale = simulated.double().norm().clamp(min=1e-30)
        found[name] = float((real.double() - simulated.double()).norm() / scale)

    compare_outputs(trained, shipped, list(modules_of(trained, layers)), inputs, visit)
    return sorted(found.items(), key=lambda item: -item[1])


@torch.no_grad()
def weight_differences(trained: nn.Module, shipped: nn.Module, layers: Sequence[str]) -> list[tuple[str, float]]:
    """How far each weight that is not quantised is from its original, |shipped - trained| / |trained|, the worst first.

    Args:
        layers: names of the quantised layers, whose weights are left out.
    """
    found = []
    for name, parameter in trained.named_parameters():
        if name.removesuffix(".weight") not in layers:
            before, after = parameter.double(), shipped.get_parameter(name).to(parameter.dtype).double()
            found.append((name, float((after - before).norm() / before.norm().clamp(min=1e-30))))
    return sorted(found, key=lambda item: -item[1])
