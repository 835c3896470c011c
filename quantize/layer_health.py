"""Which layer hurts: each quantised layer beside its 16-bit original on equal inputs, and the range of those inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.layers import modules_of

Visit = Callable[[str, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class LayerHealth:
    """One quantised layer on a few batches.

    Attributes:
        sqnr_db: signal-to-quantisation-noise ratio of its output, 20 * log10(|y| / |y - y_q|); weights and activations
            as quantised, inputs those of the 16-bit model. None where the outputs are equal.
        input_max: largest magnitude of an input.
        input_crest: that divided by the inputs' root mean square; large = outliers, which int8 rounds coarsely.
    """

    sqnr_db: float | None
    input_max: float
    input_crest: float


@torch.inference_mode()
def compare_outputs(
    reference: nn.Module, other: nn.Module, layers: Sequence[str], inputs: Mapping[str, Any], visit: Visit
) -> None:
    """Runs `reference` once, and each named layer of `other` on the input that the reference's layer sees.

    Args:
        layers: names of modules (`layers.modules_of`).
        inputs: a batch, as the models' forward takes it.
        visit: called with (layer, its input, the reference's output, the other's output).
    """
    seen: dict[str, tuple[Tensor, ...]] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments

        return hook

    def compare(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            layer: Any = other.get_submodule(name)
            given = seen.pop(name)  # token ids, for an embedding; which experts are chosen, for experts
            dtype = next(layer.parameters()).dtype
            real = layer(*(each.to(dtype) if each.is_floating_point() else each for each in given))
            visit(name, given[0], output, real)

        return hook

    handles = []
    head: Any = reference
    positions = 0 if head.get_output_embeddings() in [reference.get_submodule(name) for name in layers] else 1
    for name in layers:
        module = reference.get_submodule(name)
        handles.append(module.register_forward_pre_hook(remember(name), prepend=True))
        handles.append(module.register_forward_hook(compare(name)))
    try:
        reference(**inputs, use_cache=False, logits_to_keep=positions)
    finally:
        for handle in handles:
            handle.remove()


def measure_layers(
    reference: nn.Module, quantised: nn.Module, layers: Sequence[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, LayerHealth]:
    """The health of each layer that these batches reach, in the order of `layers`, over all of them together.

    The matrices of fused experts are measured together, under the name of their module.
    Padded positions are left out where the layer sees them as such: a batch's `attention_mask` says which they are.
    """
    layers = list(modules_of(reference, layers))
    signal, noise, energy, count, largest = (dict.fromkeys(layers, 0.0) for _ in range(5))
    keep = torch.ones(1, 1, dtype=torch.bool)

    def visit(name: str, given: Tensor, expected: Tensor, real: Tensor) -> None:
        padded = given.shape[:-1].numel() == keep.numel()  # a routed expert gets its tokens without the padding
        inputs, wanted, found = (
            (tensor.reshape(*keep.shape, -1)[keep] if padded else tensor).double() for tensor in (given, expected, real)
        )  # (tokens, I), (tokens, O), (tokens, O)
        signal[name] += float(wanted.square().sum())
        noise[name] += float((found - wanted).square().sum())
        energy[name] += float(inputs.square().sum())
        count[name] += inputs.numel()
        if inputs.numel():
            largest[name] = max(largest[name], float(inputs.abs().max()))

    for batch in batches:
        keep = batch["attention_mask"].bool()
        compare_outputs(reference, quantised, layers, batch, visit)
    return {
        name: LayerHealth(
            sqnr_db=10 * math.log10(signal[name] / noise[name]) if noise[name] > 0 and signal[name] > 0 else None,
            input_max=largest[name],
            input_crest=largest[name] / math.sqrt(energy[name] / count[name]) if energy[name] else 0.0,
        )
        for name in layers
        if count[name]
    }
