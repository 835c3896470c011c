"""What one layer of QAT is made of: what it knows about its format, and the tensors that it multiplies.

Shapes: `O` out_features, `I` in_features, `G` groups, `R` rank; A is (R, I), B is (O, R).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from qat.cache import WeightCache
from qat.kernels import Layer, Path, path_of
from quantize.numerics import Numbers, Quantised


@dataclass(frozen=True, kw_only=True)
class LayerNumerics:
    """What one layer needs to know about its format.

    Attributes:
        name: the layer's name without wrappers.
        numbers: the format's numbers.
        group_size: weights per scale; None = one scale a row.
        dtype: what the shipped layer computes in; its scales have it too.
        scaling: LoRA's s.
        calls: counts, by layer name, how often fake quantisation ran; shared by all layers of the model.
        factor: (O, G) multiplies each group's range; learned where it requires a gradient. None: 1, exactly.
        fused: use the fused kernels where there are some.
        keep: keep the fake-quantised weight from forward to backward; False makes it again where that saves memory.
        cache: of fake-quantised weights; shared by all layers of the model.
        experts: matrices that lie one below the other in the weight, the adapters and the factor.
    """

    name: str
    numbers: Numbers
    group_size: int | None
    dtype: torch.dtype
    scaling: float
    calls: Counter[str]
    factor: Tensor | None = None
    fused: bool = True
    keep: bool = True
    cache: WeightCache = field(default_factory=lambda: WeightCache(limit=0))
    experts: int = 1

    def path(self, weight: Tensor, compute: torch.dtype) -> Path:
        """How this layer is computed in `compute` where `weight` lies."""
        return path_of(self.numbers, weight.device.type, weight.dtype, compute, fused=self.fused)

    def count(self) -> None:
        """Notes that this layer's forward ran with fake quantisation."""
        self.calls[self.name] += 1

    def layer(self, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, factor: Tensor | None) -> Layer:
        """The layer with these weights."""
        return Layer(weight, lora_a, lora_b, self.scaling, factor, self.group_size, self.dtype, self.experts)

    @torch.no_grad()
    def quantise(self, weight: Tensor, lora_a: Tensor | None = None, lora_b: Tensor | None = None) -> Quantised:
        """W + s B A (O, I) on the grid that ships."""
        with torch.autocast(weight.device.type, enabled=False):
            return self.path(weight, weight.dtype).quantise(self.layer(weight, lora_a, lora_b, self.factor))


class Projection(NamedTuple):
    """The tensors of one layer; the adapters and the bias may be None. `factor` is `numerics.factor`.

    `weight` may require a gradient (full fine-tuning).
    """

    weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None
    factor: Tensor | None
