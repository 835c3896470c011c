"""Fused experts (`quantize.experts`) set apart while algorithms work: each as a gated MLP of two linear layers.

What looks for linear layers, or hooks them, then finds those of every expert, with the tokens that are routed to it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from quantize.experts import MATRICES, Product, apply_experts, count_of, fused_experts, join
from quantize.numerics import Quantised


class Expert(nn.Module):
    """One of fused experts. Its weights are views of the fused parameters: what changes one in place changes both."""

    gate_up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, fused: Any, number: int) -> None:
        super().__init__()
        for leaf in MATRICES:
            matrix = fused._parameters[leaf].data[number]
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(matrix, requires_grad=False)
            setattr(self, leaf, linear)


def experts_of(module: nn.Module) -> list[Expert]:
    """The experts of a module that holds fused ones, while they are apart; none of any other."""
    return [each for each in module.children() if isinstance(each, Expert)]


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[dict[str, str]]:
    """Inside, all fused experts of a plain model are apart, and compute what they did, to the bit of the eager forward.

    Yields:
        name of each expert's linear layer (`model.layers.0.mlp.experts.3.down_proj`) -> that of the fused parameter.
    """
    fused = list(fused_experts(model))
    names: dict[str, str] = {}
    for name, module in fused:
        for number in range(count_of(module)):
            module.add_module(str(number), Expert(module, number))
            names |= {f"{name}.{number}.{leaf}": f"{name}.{leaf}" for leaf in MATRICES}
        module.forward = types.MethodType(_forward, module)
    try:
        yield names
    finally:
        for _, module in fused:
            del module.forward
            for number in range(count_of(module)):
                delattr(module, str(number))


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    products = {leaf: _product(self, leaf) for leaf in MATRICES}
    return apply_experts(self, hidden_states, top_k_index, top_k_weights, products)


def _product(fused: Any, leaf: str) -> Product:
    return lambda expert, inputs: getattr(fused._modules[str(expert)], leaf)(inputs)


def join_experts(weights: Mapping[str, Quantised], apart: Mapping[str, str]) -> dict[str, Quantised]:
    """Weights by layer, those of experts apart as the fused parameters that `experts_apart` says they are.

    Args:
        weights: all experts of a parameter, in their order.
    """
    together: dict[str, list[Quantised]] = {}
    for name, quantised in weights.items():
        together.setdefault(apart.get(name, name), []).append(quantised)
    return {name: parts[0] if len(parts) == 1 else join(parts) for name, parts in together.items()}
