"""How a layer's fake quantisation is computed: by fused kernels, or by the definition itself in plain torch.

Here is the one place that chooses: `path_of`. Of the same merged weight and the same input both paths make the same
bits (tests/kernels); the kernels sum W + s B A in another order, in float32 as well. A weight is merged, rounded and
restored in one read (two where a scale spans a row) and one write, an input in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantize import float8, integers
from quantize.experts import join
from quantize.numerics import Numbers, Quantised


@torch.no_grad()
def merged_weight(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
    """W + s B A in float32, of which the grid's integers are chosen; W itself where there is no adapter.

    A bf16 sum would hide every adapter that moves a weight by less than half a step of bf16.

    Args:
        weight: (O, I). lora_a: (R, I) or None. lora_b: (O, R) or None.
    """
    if lora_a is None or lora_b is None:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scaling)


class Layer(NamedTuple):
    """What one layer multiplies.

    Attributes:
        weight: (O, I). lora_a: (R, I) or None. lora_b: (O, R) or None.
        scaling: LoRA's s.
        factor: (O, G) of each group's range, or None.
        group_size: weights per scale; None = one scale a row.
        dtype: of the scales, and of the restored weight before it is cast to what the layer computes in.
        experts: matrices (O, I) that lie one below the other: (experts * O, I), A (experts * R, I), B (experts * O, R).
    """

    weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    factor: Tensor | None
    group_size: int | None
    dtype: torch.dtype
    experts: int = 1

    def apart(self) -> list[Layer]:
        """The layer of each expert."""
        parts = [
            (None,) * self.experts if part is None else part.chunk(self.experts)
            for part in (self.weight, self.lora_a, self.lora_b, self.factor)
        ]
        each = zip(*parts, strict=True)
        return [
            self._replace(weight=weight, lora_a=lora_a, lora_b=lora_b, factor=factor, experts=1)
            for weight, lora_a, lora_b, factor in each
        ]


class Path:
    """How a format is computed: here by the definition of its numbers, step by step, on every device."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def quantise(self, layer: Layer) -> Quantised:
        """The merged weight on the grid that ships."""
        if layer.experts > 1:
            return join([self.quantise(each).compact() for each in layer.apart()])
        merged = merged_weight(layer.weight, layer.lora_a, layer.lora_b, layer.scaling)
        return self.numbers.quantise(merged, layer.group_size, layer.dtype, layer.factor)

    def weights(self, layers: Sequence[Layer], compute: torch.dtype) -> list[Tensor | Quantised]:
        """The merged weights as the product takes them: restored (O, I) in `compute`, or on their grid.

        One for each of the layers, which share their input, or a single one of all, one below the other.
        """
        found: list[Tensor | Quantised] = []
        for layer in layers:
            quantised = Path.quantise(self, layer)
            as_it_is = self.numbers.linear is not None
            found.append(quantised if as_it_is else Path.restored_weight(self, quantised, layer.dtype, compute))
        return found

    def restored_weight(self, weight: Tensor | Quantised, layer_dtype: torch.dtype, compute: torch.dtype) -> Tensor:
        """What `weights` gave, restored (O, I) for the gradients."""
        return weight if isinstance(weight, Tensor) else self.numbers.restore(weight, layer_dtype).to(compute)

    def inputs(self, x: Tensor) -> Tensor | Quantised:
        """The inputs (..., I) as the product takes them: rounded, or on their grid."""
        rounding = self.numbers.encode or self.numbers.activation
        return x if rounding is None else rounding(x)

    def restored_inputs(self, inputs: Tensor | Quantised, compute: torch.dtype) -> Tensor:
        """What `inputs` gave, restored (..., I) for the gradients."""
        if isinstance(inputs, Tensor):
            return inputs
        assert self.numbers.decode is not None
        return self.numbers.decode(inputs, compute)

    def product(self, inputs: Any, weight: Any, bias: Tensor | None, compute: torch.dtype) -> Tensor:
        """(..., O): the shipped layer's output."""
        if self.numbers.linear is not None:
            return self.numbers.linear(inputs, weight, bias, compute)
        return self.numbers.product(inputs, weight, bias)

    def takes_experts(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of that capability rounds and multiplies the weights of all experts at once."""
        return False

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor | Quantised:
        """`inputs(silu(gate) * up)`."""
        return self.inputs(torch.nn.functional.silu(gate) * up)

    def swiglu_backward_(self, gate: Tensor, up: Tensor, grad: Tensor) -> Tensor | Quantised:
        """Replaces gate and up by their gradients; returns what `swiglu` gave. `grad` may be overwritten."""
        silu = torch.nn.functional.silu(gate)
        inputs = self.inputs(silu * up)
        to_gate = torch.ops.aten.silu_backward(grad * up, gate)
        up.copy_(grad * silu)
        gate.copy_(to_gate)
        return inputs


class FusedPath(Path):
    """The same rounding, bit for bit, by Triton's kernels; SiLU's exponential is another implementation.

    Attributes:
        bits: width of symmetric integers per group; None = asymmetric int4.
        rows: one scale a row, multiplied after the sum, in place of groups.
        kind: how inputs are rounded: "none", "int8", "fp8", "fp8-mslk".
        mslk: weights are rounded as mslk does.
        float8: inputs and weights are multiplied in float8.
    """

    def __init__(
        self, numbers: Numbers, *, bits: int | None = None, rows: bool = False, kind: str = "none", mslk: bool = False
    ) -> None:
        from qat.kernels import grouped, inputs, merged  # here, as Triton is not everywhere
        from qat.kernels import rows as row_kernels

        super().__init__(numbers)
        self.bits, self.rows, self.kind, self.mslk = bits, rows, kind, mslk
        self.float8 = kind.startswith("fp8")
        self._alike, self._inputs = merged.alike, inputs
        self._grouped_weight, self._row_weight = grouped.grouped_weight, row_kernels.row_weight

    def quantise(self, layer: Layer) -> Quantised:
        """See `Path.quantise`."""
        kind = self._alike([layer])
        if kind is None:  # of experts whose rows do not fill a tile
            return super().quantise(layer)
        if self.rows:
            return self._row_weight([layer], kind, values=self._stored(), mslk=self.mslk)
        if layer.group_size is None:
            return super().quantise(layer)
        quantised = self._grouped_weight(
            [layer], kind, layer.group_size, layer.dtype, bits=self.bits, out=None, mslk=self.mslk
        )
        assert isinstance(quantised, Quantised)
        return quantised

    def weights(self, layers: Sequence[Layer], compute: torch.dtype) -> list[Tensor | Quantised]:
        """See `Path.weights`."""
        kind = self._alike(layers)
        if kind is None and len(layers) > 1:
            return [self.weights([layer], compute)[0] for layer in layers]
        if kind is None:
            return super().weights(layers, compute)
        if self.rows:
            values = compute if self.kind == "none" else self._stored()
            return [self._row_weight(layers, kind, values=values, mslk=self.mslk)]
        group, dtype = layers[0].group_size, layers[0].dtype
        if group is None:
            return super().weights(layers, compute)
        return [self._grouped_weight(layers, kind, group, dtype, bits=self.bits, out=compute, mslk=self.mslk)]

    def _stored(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.float8 else torch.int8

    def restored_weight(self, weight: Tensor | Quantised, layer_dtype: torch.dtype, compute: torch.dtype) -> Tensor:
        """See `Path.restored_weight`."""
        return weight if isinstance(weight, Tensor) else self._inputs.restored_rows(weight, layer_dtype).to(compute)

    def inputs(self, x: Tensor) -> Tensor | Quantised:
        """See `Path.inputs`."""
        return self._inputs.rounded(x, self.kind)

    def restored_inputs(self, inputs: Tensor | Quantised, compute: torch.dtype) -> Tensor:
        """See `Path.restored_inputs`."""
        return inputs if isinstance(inputs, Tensor) else self._inputs.restored_rows(inputs, compute)

    def takes_experts(self, capability: tuple[int, int]) -> bool:
        """See `Path.takes_experts`. torch's grouped product of float8 with a scale a row is Hopper's alone."""
        if self.rows:
            return self.kind == "fp8" and capability == (9, 0) and hasattr(torch, "_scaled_grouped_mm")
        return capability >= (9, 0)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor | Quantised:
        """See `Path.swiglu`."""
        return self._inputs.swiglu(gate, up, self.kind)

    def swiglu_backward_(self, gate: Tensor, up: Tensor, grad: Tensor) -> Tensor | Quantised:
        """See `Path.swiglu_backward_`."""
        return self._inputs.swiglu_backward_(gate, up, grad, self.kind)


@cache
def fused_path(numbers: Numbers) -> FusedPath | None:
    """The kernels of a format; None for the formats that have none."""
    symmetric = {2: integers.INT2, 3: integers.INT3, 4: integers.INT4, 8: integers.INT8}
    for bits, format_ in symmetric.items():
        if numbers is format_:
            return FusedPath(numbers, bits=bits)
    if numbers is integers.INT8_INT4:
        return FusedPath(numbers, bits=4, kind="int8")
    if numbers is integers.TINYGEMM:
        return FusedPath(numbers)
    if numbers is integers.INT8_ROWS:
        return FusedPath(numbers, rows=True)
    if numbers is float8.FP8:
        return FusedPath(numbers, rows=True, kind="fp8")
    if numbers is integers.INT4_MSLK:
        return FusedPath(numbers, mslk=True)
    if numbers is float8.FP8_MSLK:
        return FusedPath(numbers, rows=True, kind="fp8-mslk", mslk=True)
    return None


@cache
def path_of(numbers: Numbers, device_type: str, dtype: torch.dtype, compute: torch.dtype, *, fused: bool) -> Path:
    """How a layer whose weight lies on this kind of device, in this dtype, computes its format in `compute`.

    Args:
        fused: False asks for the definition itself.
    """
    known = {dtype, compute} <= {torch.bfloat16, torch.float32}  # the kernels' roundings know no float16
    if fused and device_type == "cuda" and known and find_spec("triton"):
        found = fused_path(numbers)
        if found is not None:
            needed = (8, 9) if found.float8 else (8, 0)  # float8 is Ada's, bf16 Ampere's
            if torch.cuda.get_device_capability() >= needed:
                return found
    return Path(numbers)
