"""AWQ and SmoothQuant: scales that move between a layer and the one before it, chosen by the layer's real output.

AWQ (Lin et al. 2023, arXiv 2306.00978) scales input channels by the mean of their activations to a power;
SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) by max|x|^a / max|w|^(1-a). The exponent of both is searched for each
link on calibration data, where the error is that of the format itself: weights and activations as they ship.

Shapes: `O` out_features, `I` in_features, `N` calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from quantize.algorithms.structure import Link
from quantize.numerics import Numbers

_STEPS = 20  # of the exponent, from 0 to 1


@torch.no_grad()
def best_scale(
    link: Link,
    method: Literal["awq", "smoothquant"],
    inputs: Tensor,
    peaks: Tensor,
    layers: Sequence[nn.Linear],
    numbers: Numbers,
    group_size: int | None,
    scale_dtype: torch.dtype,
) -> Tensor | None:
    """The scale of the link's source channels that quantises best; None where none is better than no scale.

    Args:
        inputs: (N, I) sampled inputs of the readers. peaks: (I,) largest |input| over all calibration tokens.
        layers: the readers that are quantised.
    """
    wanted = [nn.functional.linear(inputs, layer.weight) for layer in layers]
    best, least = None, _output_error(torch.ones_like(peaks), inputs, layers, wanted, numbers, group_size, scale_dtype)
    for scale in _CANDIDATES[method](link, inputs, peaks):
        error = _output_error(link.spread(scale), inputs, layers, wanted, numbers, group_size, scale_dtype)
        if error < least:
            best, least = scale, error
    return best


def _output_error(
    scale: Tensor,
    inputs: Tensor,
    layers: Sequence[nn.Linear],
    wanted: Sequence[Tensor],
    numbers: Numbers,
    group_size: int | None,
    scale_dtype: torch.dtype,
) -> float:
    """Squared error of the quantised layers' outputs with that scale (I,) between them and their source."""
    divided, total = (inputs.float() / scale).to(inputs.dtype), 0.0
    for layer, exact in zip(layers, wanted, strict=True):
        quantised = numbers.quantise(layer.weight.float() * scale, group_size, scale_dtype, None)
        total += float((numbers.compute(divided, quantised, None) - exact).float().square().sum())
    return total


def _awq(link: Link, inputs: Tensor, peaks: Tensor) -> Iterator[Tensor]:
    typical = link.shared(inputs.float().abs().mean(0), largest=False).clamp(min=1e-6)
    for step in range(1, _STEPS + 1):
        scale = typical.pow(step / _STEPS).clamp(min=1e-4)
        yield scale / (scale.amax() * scale.amin()).sqrt()


def _smoothquant(link: Link, inputs: Tensor, peaks: Tensor) -> Iterator[Tensor]:
    weights = torch.stack([reader.weight.float().abs().amax(0) for reader in link.readers]).amax(0)
    activation = link.shared(peaks, largest=True).clamp(min=1e-5)
    weight = link.shared(weights, largest=True).clamp(min=1e-5)
    for step in range(_STEPS + 1):
        exponent = step / _STEPS
        scale = (activation.pow(exponent) / weight.pow(1 - exponent)).clamp(min=1e-5)
        yield scale / (scale.amax() * scale.amin()).sqrt()  # a common factor changes nothing but the norm's size


_CANDIDATES: Mapping[str, Callable[[Link, Tensor, Tensor], Iterator[Tensor]]] = {
    "awq": _awq,
    "smoothquant": _smoothquant,
}
