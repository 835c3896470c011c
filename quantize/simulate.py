"""The shipped numbers in the plain graph: fake quantisation of a merged model, for evaluation only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantize.layers import Coverage, linear_layers
from quantize.schemes import Scheme, Target


@torch.no_grad()
def simulate_(model: nn.Module, scheme: Scheme, target: Target, group_size: int | None, coverage: Coverage) -> None:
    """Replaces the weights of the covered layers by their round trip and rounds those layers' inputs, in place.

    The result computes what the real quantised layers compute, up to the order of accumulation in their kernels.
    """
    chosen = set(coverage.layers)
    for name, linear in linear_layers(model):
        if name not in chosen:
            continue
        linear.weight = nn.Parameter(target.weight(linear.weight.data, group_size), requires_grad=False)
        if target.activation is not None:
            linear.register_forward_pre_hook(_rounds_input(target.activation))
    if scheme.embedding is not None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        embedding.weight = nn.Parameter(scheme.embedding_weight(embedding.weight.data, None), requires_grad=False)


def _rounds_input(round_trip: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (round_trip(arguments[0]),)

    return hook
