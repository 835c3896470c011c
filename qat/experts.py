"""Fused experts with their adapters inside the fake quantiser: each expert's matrix is a layer of its own.

peft trains the matrices of fused experts, which are parameters and no layers, through `target_parameters`: it wraps the
module once for each parameter (`ParamWrapper`), and before each forward adds B A of every expert to the weights of all.
Here they are merged and rounded as they ship: all at once where the GPU and the format have kernels for that, else
one by one, and only those that a token reaches.

Shapes: `E` experts, `O` out_features, `I` in_features, `R` rank of an expert's adapter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.function import compute_dtype
from qat.kernels import merged_weight
from qat.layer import LayerNumerics, Projection
from qat.linear import fake_quant_linear
from qat.together import GroupedProduct, adapter_product, apply_together, fake_quant_product, plain_product, suits
from quantize import experts
from quantize.errors import UserError
from quantize.layers import plain_name
from quantize.numerics import Quantised


@dataclass(frozen=True, eq=False)
class ExpertMatrix:
    """One parameter (E, O, I) of fused experts, and its adapter where it has one.

    Attributes:
        outer: the module that the model calls: the experts, or the outermost of peft's wrappers around them.
        experts: the module that holds the parameter.
        leaf: the parameter's name.
        wrapper: peft's wrapper of that parameter; None without an adapter.
    """

    outer: Any
    experts: Any
    leaf: str
    wrapper: Any = None

    @property
    def weight(self) -> Tensor:
        """(E, O, I)."""
        weight: Tensor = self.experts._parameters[self.leaf]
        return weight

    @property
    def scaling(self) -> float:
        """LoRA's s; 1 without an adapter."""
        return 1.0 if self.wrapper is None else float(self.wrapper.scaling[self._adapter])

    @property
    def _adapter(self) -> str:
        (name,) = self.wrapper.active_adapters
        return str(name)

    @property
    def count(self) -> int:
        """E."""
        return experts.count_of(self.experts)

    def projection(self, factor: Tensor | None) -> Projection:
        """What all experts multiply, one below the other: W (E * O, I), A (E * R, I), B (E * O, R).

        Args:
            factor: (E * O, G) of the ranges.

        Returns:
            A and B are None where no adapter is in use.
        """
        weight = self.weight.flatten(0, 1)
        if self.wrapper is None or self.wrapper.disable_adapters:
            return Projection(weight, None, None, None, factor)
        lora_a, lora_b = (matrices[self._adapter].weight for matrices in (self.wrapper.lora_A, self.wrapper.lora_B))
        # peft keeps B as (O, R * E), the expert changing fastest.
        lora_b = lora_b.reshape(lora_b.shape[0], -1, self.count).permute(2, 0, 1).flatten(0, 1)
        return Projection(weight, lora_a, lora_b, None, factor)

    def projections(self, factor: Tensor | None) -> list[Projection]:
        """What each expert multiplies, as views. factor: as for `projection`."""
        # unbind, not one index an expert: its backward builds the gradient once.
        parts = [
            (None,) * self.count if part is None else part.reshape(self.count, -1, part.shape[-1]).unbind(0)
            for part in self.projection(factor)
        ]
        return [Projection(*each) for each in zip(*parts, strict=True)]

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s B A of every expert (E, O, I), as `merged_weight` sums it."""
        each = [merged_weight(p.weight, p.lora_a, p.lora_b, self.scaling) for p in self.projections(None)]
        return torch.stack(each)

    @torch.no_grad()
    def quantise(self, numerics: LayerNumerics) -> Quantised:
        """W + s B A of every expert on the grid that ships, one below the other: (E * O, I)."""
        weight, lora_a, lora_b, _, _ = self.projection(numerics.factor)
        return numerics.quantise(weight, lora_a, lora_b).compact()


def expert_matrices(model: nn.Module) -> dict[str, ExpertMatrix]:
    """Plain name of each parameter of fused experts -> it, with peft's wrappers around it."""
    found: dict[str, ExpertMatrix] = {}
    wrappers: dict[str, list[Any]] = defaultdict(list)
    for name, module in model.named_modules():
        if hasattr(module, "parameter_name") and hasattr(module, "base_layer"):
            wrappers[plain_name(name)].append(module)  # the outermost first
        elif experts.is_fused(module):
            around = wrappers[plain_name(name)]
            for leaf in experts.MATRICES:
                wrapper = next((each for each in around if each.parameter_name == leaf), None)
                found[f"{plain_name(name)}.{leaf}"] = ExpertMatrix(
                    around[0] if around else module, module, leaf, wrapper
                )
    return found


def experts_forward(
    matrices: Sequence[tuple[ExpertMatrix, LayerNumerics | None]], *, inside: bool
) -> Callable[..., Tensor]:
    """The forward of fused experts.

    Args:
        matrices: both, each with its numbers; None where it keeps 16 bit.
        inside: the adapters are inside the fake quantisers.
    """
    held = matrices[0][0].experts
    one_by_one = [_OneByOne(matrix, numerics, inside=inside) for matrix, numerics in matrices]

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        for matrix, numerics in matrices:
            _refuse_changed(matrix, numerics)
        compute = compute_dtype(hidden_states, matrices[0][0].weight)
        if all(suits(matrix.weight, numerics, compute) for matrix, numerics in matrices):
            at_once = {matrix.leaf: _together(matrix, numerics, inside) for matrix, numerics in matrices}
            gated = experts.gate_of(held)
            output = apply_together(hidden_states, top_k_index, top_k_weights, experts.count_of(held), at_once, gated)
        else:
            products = {each.matrix.leaf: each.product() for each in one_by_one}
            output = experts.apply_experts(held, hidden_states, top_k_index, top_k_weights, products)
        for _, numerics in matrices:
            if numerics is not None:
                numerics.count()
        return output

    return forward


def _together(matrix: ExpertMatrix, numerics: LayerNumerics | None, inside: bool) -> GroupedProduct:
    """The product of all experts at once."""
    projection = matrix.projection(None)
    lora_a, lora_b = projection.lora_a, projection.lora_b
    if numerics is None:
        base = plain_product(matrix.weight)
    else:
        within = projection if inside else projection._replace(lora_a=None, lora_b=None)
        base = fake_quant_product(within, numerics)
    if lora_a is None or lora_b is None or (inside and numerics is not None):
        return base
    more = adapter_product(lora_a, lora_b, matrix.scaling, matrix.count, matrix.weight.dtype)
    return lambda rows, ends: base(rows, ends) + more(rows, ends)


class _OneByOne:
    """The product of each expert that a token reaches, on every device and in every format."""

    def __init__(self, matrix: ExpertMatrix, numerics: LayerNumerics | None, *, inside: bool) -> None:
        self.matrix, self.numerics = matrix, numerics
        self.inside = inside and numerics is not None
        self.each = [] if numerics is None else _apart(numerics, matrix.count)

    def product(self) -> experts.Product:
        """With the tensors in use."""
        numerics, scaling = self.numerics, self.matrix.scaling
        parts = self.matrix.projections(None if numerics is None else numerics.factor)

        def compute(expert: int, inputs: Tensor) -> Tensor:
            part = parts[expert]
            bare = part._replace(lora_a=None, lora_b=None)
            if numerics is None:
                output = nn.functional.linear(inputs, part.weight)
            else:
                output = fake_quant_linear(inputs, part if self.inside else bare, self.each[expert])
            if part.lora_a is None or part.lora_b is None or self.inside:
                return output
            adapted = inputs.to(part.lora_a.dtype) @ part.lora_a.t() @ part.lora_b.t() * scaling
            return output + adapted.to(output.dtype)

        return compute


def _apart(numerics: LayerNumerics, count: int) -> list[LayerNumerics]:
    """The numbers of each expert's matrix, its part of the ranges' factors being a view of theirs."""
    factor = numerics.factor
    parts = [None] * count if factor is None else factor.detach().reshape(count, -1, factor.shape[-1]).unbind(0)
    return [replace(numerics, name=f"{numerics.name}[{n}]", factor=part, experts=1) for n, part in enumerate(parts)]


def _refuse_changed(matrix: ExpertMatrix, numerics: LayerNumerics | None) -> None:
    """Refuses an adapter that peft changed since it was prepared: what is computed would not be what ships."""
    if numerics is None or matrix.wrapper is None:
        return
    if matrix.wrapper.merged:
        raise UserError(
            f"{numerics.name}: its adapter was merged after prepare_qat; call model.unmerge_adapter() first"
        )
    if matrix.scaling != numerics.scaling:
        raise UserError(f"{numerics.name}: its adapter was changed after prepare_qat; prepare the model again")
