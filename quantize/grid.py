"""The weights as they were trained: integers and scales on disk, between training and conversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantize.layers import embedding_name
from quantize.numerics import Quantised
from quantize.schemes import Scheme, Target

if TYPE_CHECKING:
    from torch import nn

_FILE = "grid.safetensors"


def save_grid(folder: Path, layers: Iterable[tuple[str, Quantised]]) -> None:
    """Writes (layer name, weight on its grid) to `folder`; `load_grid` reads it back."""
    from safetensors.torch import save_file

    tensors = {}
    for name, quantised in layers:
        values = quantised.values
        tensors[f"{name}.values"] = (values if values.dtype == torch.float8_e4m3fn else values.to(torch.int8)).cpu()
        tensors[f"{name}.scale"] = quantised.scale.cpu()
        if quantised.zero is not None:
            tensors[f"{name}.zero"] = quantised.zero.cpu()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / _FILE)


def load_grid(folder: Path, device: str = "cpu") -> dict[str, Quantised]:
    """Layer name -> its weight on the grid, as `save_grid` wrote it."""
    from safetensors.torch import load_file

    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / _FILE, device=device).items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = tensor
    return {name: Quantised(**tensors) for name, tensors in parts.items()}


def quantised_weights(
    model: nn.Module,
    scheme: Scheme,
    target: Target,
    group_size: int | None,
    layers: Iterable[str],
    grid: Mapping[str, Quantised] | None,
) -> Iterable[tuple[nn.Module, Target, Quantised]]:
    """(module, the target that it ships for, its weight on the grid) of every quantised module, one at a time.

    Args:
        grid: the weights as trained; None rounds the model's own weights to nearest.
    """
    chosen = [(name, model.get_submodule(name), target, group_size) for name in layers]
    if scheme.embedding is not None:
        name = embedding_name(model)
        chosen.append((name, model.get_submodule(name), scheme.embedding, None))
    for name, module, where, size in chosen:
        weight: Any = module.weight.data
        # A simulation may hold a bf16 target in float32; its numbers are those of bf16 all the same.
        dtype = getattr(torch, where.dtype) if where.dtype else weight.dtype
        yield module, where, grid[name] if grid else where.numbers().quantise(weight.to(dtype), size, dtype, None)
