"""AWQ and SmoothQuant: scales that move between a layer and the one before it, chosen by the layer's real output.

AWQ (Lin et al. 2023, arXiv 2306.00978) scales input channels by the mean of their activations to a power;
SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) by max|x|^a / max|w|^(1-a). The exponent of both is searched for each
link on calibration data, where the error is that of the format itself: weights and activations as they ship.

Shapes: `I` in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from quantize.algorithms.calibration import Sample
from quantize.algorithms.structure import Link
from quantize.numerics import Numbers

_STEPS = 20  # of the exponent, from 0 to 1


@torch.no_grad()
def best_scale(
    link: Link,
    method: Literal["awq", "smoothquant"],
    samples: Sequence[Sample],
    numbers: Numbers,
    group_size: int | None,
    scale_dtype: torch.dtype,
) -> Tensor | None:
    """The scale of the link's source channels that quantises best; None where none is better than no scale.

    Args:
        samples: of the readers that are quantised. Each counts by the tokens that reach it, as experts see their own.
    """
    wanted = [nn.functional.linear(sample.inputs, sample.layer.weight) for sample in samples]
    ones = torch.ones_like(samples[0].peaks)
    best, least = None, _output_error(ones, samples, wanted, numbers, group_size, scale_dtype)
    for scale in _CANDIDATES[method](link, samples):
        error = _output_error(link.spread(scale), samples, wanted, numbers, group_size, scale_dtype)
        if error < least:
            best, least = scale, error
    return best


def _output_error(
    scale: Tensor,
    samples: Sequence[Sample],
    wanted: Sequence[Tensor],
    numbers: Numbers,
    group_size: int | None,
    scale_dtype: torch.dtype,
) -> float:
    """Squared error of the quantised layers' outputs with that scale (I,) between them and their source."""
    total = 0.0
    for sample, exact in zip(samples, wanted, strict=True):
        divided = (sample.inputs.float() / scale).to(sample.inputs.dtype)
        quantised = numbers.quantise(sample.layer.weight.float() * scale, group_size, scale_dtype, None)
        error = (numbers.compute(divided, quantised, None) - exact).float().square().sum()
        total += float(error) * sample.tokens / sample.inputs.shape[0]
    return total


def _awq(link: Link, samples: Sequence[Sample]) -> Iterator[Tensor]:
    sizes = torch.stack([sample.inputs.float().abs().mean(0) * sample.tokens for sample in samples])
    typical = link.shared(sizes.sum(0) / sum(sample.tokens for sample in samples), largest=False).clamp(min=1e-6)
    for step in range(1, _STEPS + 1):
        scale = typical.pow(step / _STEPS).clamp(min=1e-4)
        yield scale / (scale.amax() * scale.amin()).sqrt()


def _smoothquant(link: Link, samples: Sequence[Sample]) -> Iterator[Tensor]:
    peaks = torch.stack([sample.peaks for sample in samples]).amax(0)
    weights = torch.stack([sample.layer.weight.float().abs().amax(0) for sample in samples]).amax(0)
    activation = link.shared(peaks, largest=True).clamp(min=1e-5)
    weight = link.shared(weights, largest=True).clamp(min=1e-5)
    for step in range(_STEPS + 1):
        exponent = step / _STEPS
        scale = (activation.pow(exponent) / weight.pow(1 - exponent)).clamp(min=1e-5)
        yield scale / (scale.amax() * scale.amin()).sqrt()  # a common factor changes nothing but the norm's size


_CANDIDATES: Mapping[str, Callable[[Link, Sequence[Sample]], Iterator[Tensor]]] = {
    "awq": _awq,
    "smoothquant": _smoothquant,
}
