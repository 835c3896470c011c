"""The weights as they were trained: integers and scales on disk, between training and conversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantize.layers import embedding_name, find_weight
from quantize.numerics import Quantised
from quantize.schemes import Scheme, Target
from quantize.tensor_files import Place, read_places

if TYPE_CHECKING:
    from torch import nn

_FILE = "grid.safetensors"


def save_grid(folder: Path, layers: Iterable[tuple[str, Quantised]]) -> None:
    """Writes (layer name, weight on its grid) to `folder`; `load_grid` reads it back."""
    from safetensors.torch import save_file

    tensors = {}
    for name, quantised in layers:
        tensors[f"{name}.values"] = quantised.compact().values.cpu()
        tensors[f"{name}.scale"] = quantised.scale.cpu()
        if quantised.zero is not None:
            tensors[f"{name}.zero"] = quantised.zero.cpu()
        if quantised.tensor_scale is not None:
            tensors[f"{name}.tensor_scale"] = quantised.tensor_scale.cpu()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / _FILE)


def load_grid(folder: Path, device: str = "cpu") -> dict[str, Quantised]:
    """Layer name -> its weight on the grid, as `save_grid` wrote it."""
    from safetensors.torch import load_file

    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / _FILE, device=device).items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = tensor
    return {name: Quantised(**tensors) for name, tensors in parts.items()}


class GridFile:
    """The weights as trained, layer by layer and by rows, as `save_grid` wrote them."""

    def __init__(self, folder: Path) -> None:
        self._layers: dict[str, dict[str, Place]] = {}
        for key, place in read_places(folder / _FILE)[0].items():
            name, _, part = key.rpartition(".")
            self._layers.setdefault(name, {})[part] = place

    def outline(self, name: str) -> Quantised:
        """A layer's weight without its data."""
        return Quantised(**{part: place.outline() for part, place in self._layers[name].items()})

    def read(self, name: str, first: int, rows: int, device: str) -> Quantised:
        """`rows` of a layer's weight from `first` on; a part without rows is read whole."""
        parts = {
            part: place.read(first, rows) if place.shape else place.read() for part, place in self._layers[name].items()
        }
        return Quantised(**{part: tensor.to(device) for part, tensor in parts.items()})


def quantise_weight(weight: torch.Tensor, where: Target, group_size: int | None, rounding: str = "rtn") -> Quantised:
    """A weight (O, I) on the grid of `where`, by an algorithm that needs the weight alone (rtn, mse, hqq).

    Of fused experts (E, O, I) the rows of all are those of one weight (E * O, I): every format rounds rows apart.
    """
    from quantize.algorithms.rounding import round_weight

    weight = weight.flatten(0, -2)
    # A simulation may hold a bf16 target in float32; its numbers are those of bf16 all the same.
    dtype = getattr(torch, where.dtype) if where.dtype else weight.dtype
    return round_weight(rounding, where.numbers(), weight, group_size, dtype)


def quantised_weights(
    model: nn.Module,
    scheme: Scheme,
    target: Target,
    group_size: int | None,
    layers: Iterable[str],
    grid: Mapping[str, Quantised] | None,
) -> Iterable[tuple[nn.Module, str, Target, Quantised]]:
    """(module, its parameter, the target it ships for, the weight on its grid) of all that is quantised, one at a time.

    Args:
        grid: the weights as trained; None rounds the model's own weights to nearest.
    """
    chosen = [(name, target, group_size) for name in layers]
    if scheme.embedding is not None:
        chosen.append((embedding_name(model), scheme.embedding, None))
    for name, where, size in chosen:
        module, leaf = find_weight(model, name)
        weight: Any = module._parameters[leaf]
        yield module, leaf, where, grid[name] if grid else quantise_weight(weight.data, where, size)
