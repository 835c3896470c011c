"""The shipped numbers in the plain graph: fake quantisation of a merged model, for evaluation only."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize import experts
from quantize.grid import quantised_weights
from quantize.layers import Coverage, untie
from quantize.numerics import Numbers, Quantised
from quantize.schemes import Scheme, Target


@torch.no_grad()
def simulate_(
    model: nn.Module,
    scheme: Scheme,
    target: Target,
    group_size: int | None,
    coverage: Coverage,
    grid: Mapping[str, Quantised] | None = None,
) -> None:
    """Makes the covered layers compute with the numbers of `target`, in place.

    The result computes what training computed and, up to the order of accumulation in their kernels, what the real
    quantised layers compute.

    Args:
        grid: the weights as trained; None rounds the model's own weights to nearest.
    """
    if scheme.embedding is not None:
        untie(model)
    for module, leaf, where, quantised in quantised_weights(model, scheme, target, group_size, coverage.layers, grid):
        weight: Any = module._parameters[leaf]
        numbers, dtype = where.numbers(), weight.dtype
        restored = numbers.restore(quantised, scale_dtype(where, quantised, dtype)).to(dtype)
        setattr(module, leaf, nn.Parameter(restored.reshape(weight.shape), requires_grad=False))
        if weight.dim() == 3:
            _bind_experts(module, leaf, numbers, quantised)
        elif numbers.linear is not None or (numbers.bias_after and getattr(module, "bias", None) is not None):
            module.forward = types.MethodType(_multiplies(numbers, quantised), module)
        elif numbers.activation is not None:
            module.register_forward_pre_hook(_rounds_input(numbers.activation))


def scale_dtype(target: Target, quantised: Quantised, dtype: torch.dtype) -> torch.dtype:
    """The dtype that the shipped layer restores its weight in: its scales', but of fp32 scales the model's.

    A simulation may hold a bf16 target in fp32; its weights then still have to be those that bf16 gives.
    """
    if target.dtype is not None:
        wanted = getattr(torch, target.dtype)
        assert isinstance(wanted, torch.dtype)
        return wanted
    return quantised.scale.dtype if quantised.scale.dtype == torch.bfloat16 else dtype


def _bind_experts(module: Any, leaf: str, numbers: Numbers, quantised: Quantised) -> None:
    """Lets fused experts multiply by one of their matrices as the format does; the other's product stays as it is."""
    products: dict[str, experts.Product] | None = vars(module).get("_simulated")
    if products is None:
        products = {name: _plain_product(module, name) for name in experts.MATRICES}
        module._simulated = products
        module.forward = types.MethodType(_applies(products), module)
    parts = experts.split(quantised, experts.count_of(module))
    if numbers.linear is not None:
        products[leaf] = lambda expert, inputs: numbers.compute(inputs, parts[expert], None)
    elif numbers.activation is not None:
        plain, rounded = _plain_product(module, leaf), numbers.activation
        products[leaf] = lambda expert, inputs: plain(expert, rounded(inputs))


def _applies(products: Mapping[str, experts.Product]) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts.apply_experts(self, hidden_states, top_k_index, top_k_weights, products)

    return forward


def _plain_product(module: Any, leaf: str) -> experts.Product:
    return lambda expert, inputs: nn.functional.linear(inputs, getattr(module, leaf)[expert])


def _multiplies(numbers: Numbers, quantised: Quantised) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return numbers.compute(inputs, quantised, self.bias)

    return forward


def _rounds_input(round_trip: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (round_trip(arguments[0]),)

    return hook
