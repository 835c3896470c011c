"""Conversion from disk to disk: a checkpoint becomes a quantised one while memory holds a piece of one layer.

Reading, rounding and writing go by rows where the layout keeps the rows of a weight apart, which also keeps the
temporaries of the arithmetic in the processor's cache; other layouts (tinygemm's tiles) go by layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantize.experts import has_experts
from quantize.grid import GridFile, quantise_weight
from quantize.storage import SHARD_SIZE, parts_of, save_settings, torchao_metadata, write_weights
from quantize.tensor_files import Place

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.schemes import Target

PIECE = 2**20
"""Weights that are read, rounded and written at a time."""


@dataclass(frozen=True)
class Source:
    """One entry of the state dict that is written, and where it comes from.

    Attributes:
        place: where the 16-bit weight lies.
        dtype: what it ships in: a quantised weight's scales, or the numbers themselves.
        target: layout of a quantised weight; None stays as it is.
        group_size: weights per scale.
        layer: name of the module that is quantised.
        rounding: the algorithm that rounds it: "rtn", "mse" or "hqq" (`quantize.algorithms`).
    """

    place: Place
    dtype: torch.dtype
    target: Target | None = None
    group_size: int | None = None
    layer: str = ""
    rounding: str = "rtn"


def why_not(model: Any, places: Mapping[str, Place], dtype: torch.dtype) -> str | None:
    """Why a checkpoint cannot go from file to file but must be loaded as a model; None where it can.

    Args:
        model: without its weights, in the dtype that ships.
        places: the checkpoint's tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    if has_experts(model):
        return "its experts are fused"
    if model.is_remote_code():
        return "the model brings code of its own"
    if any(isinstance(each, WeightConverter) for each in get_model_conversion_mapping(model)):
        return "transformers joins or splits its weights while loading"
    if dtype != torch.float32 and model._keep_in_fp32_modules_strict:
        return "some of its weights stay in float32"
    state, tied = model.state_dict(), model.all_tied_weights_keys
    written = _written(model)
    lacking = [key for key in written if key not in places]
    if lacking:
        return f"its files have other names than the model, which lacks {lacking[0]}"
    more = [key for key in places if key not in written and key not in _ignored(model)]
    if more:
        known = "a second copy of a tied weight" if more[0] in tied else "no part of the model"
        return f"its files hold {more[0]}, {known}"
    uneven = [key for key in written if tuple(state[key].shape) != places[key].shape]
    return f"{uneven[0]} has another shape in the file than in the model" if uneven else None


def plan(
    model: Any,
    places: Mapping[str, Place],
    chosen: Mapping[str, tuple[Target, int | None, str]],
    ties: Mapping[str, str],
) -> dict[str, Source]:
    """Where each entry of the state dict comes from, in the order of `save_pretrained`.

    Args:
        chosen: name of a module that is quantised -> its layout, group size, and what rounds it.
        ties: key that has weights of its own now -> key of the file that it shared.
    """
    state, sources = model.state_dict(), {}
    for key in _written(model):
        place, layer = places[key if key in places else ties[key]], key.removesuffix(".weight")
        how = chosen.get(layer) if key.endswith(".weight") else None
        target, size, rounding = how or (None, None, "rtn")
        sources[key] = Source(place, state[key].dtype, target, size, layer, rounding)
    return sources


def _ignored(model: Any) -> set[str]:
    return set(model._keys_to_ignore_on_save or ())


def _written(model: Any) -> list[str]:
    """The keys of a state dict that are saved, in the order of `save_pretrained`: each tied weight once."""
    from transformers.core_model_loading import dot_natural_key

    left_out = {*model.all_tied_weights_keys, *_ignored(model)}
    return sorted((key for key in model.state_dict() if key not in left_out), key=dot_natural_key)


@torch.no_grad()
def stream(
    model: Any,
    sources: Mapping[str, Source],
    folder: Path,
    *,
    grid: GridFile | None,
    device: str,
    max_shard_size: int | str = SHARD_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the quantised checkpoint of a model whose weights are on disk.

    Args:
        model: without its weights, with the marks of its format; its settings are written too.
        sources: state-dict key -> its source, tied weights once, in the order in which they are shared among files.
        grid: the weights as trained; None rounds to nearest.
        device: where the arithmetic runs.
        progress: called with (entries done, all).
    """
    outlines = {
        key: _outline(source, grid, source.place.shape[0] if source.place.shape else 1)
        for key, source in sources.items()
    }
    state = {key: outlines.get(key, tensor) for key, tensor in model.state_dict().items()}
    flat = {name: part for key, outline in outlines.items() for name, part in parts_of(key, outline).items()}

    def data() -> Iterator[tuple[str, int, Tensor]]:
        for done, (key, source) in enumerate(sources.items(), 1):
            rows = _rows_at_a_time(key, source, outlines[key], grid)
            for first in range(0, source.place.shape[0], rows) if source.place.shape else (0,):
                for name, part in parts_of(key, _made(source, grid, first, rows, device)).items():
                    yield name, first, part
            if progress is not None:
                progress(done, len(sources))

    weights = model.num_parameters()
    write_weights(folder, flat, torchao_metadata(state), data(), weights=weights, max_shard_size=max_shard_size)
    save_settings(model, folder)


def _outline(source: Source, grid: GridFile | None, rows: int) -> Any:
    """What `rows` of an entry will be, without the data."""
    shape = (rows, *source.place.shape[1:]) if source.place.shape else ()
    plain = torch.empty(shape, dtype=source.dtype, device="meta")
    if source.target is None:
        return plain
    quantised = quantise_weight(plain, source.target, source.group_size)
    if grid is not None:
        parts = vars(grid.outline(source.layer)).items()
        quantised = replace(
            quantised, **{name: part if not part.dim() else part[:rows] for name, part in parts if part is not None}
        )
    return source.target.tensor(quantised, source.dtype)


def _rows_at_a_time(key: str, source: Source, outline: Any, grid: GridFile | None) -> int:
    """How many rows of a weight can be made by themselves: all of them where its layout mixes rows."""
    all_rows = source.place.shape[0] if source.place.shape else 1
    rows = max(1, PIECE // max(1, source.place.size // source.place.dtype.itemsize // all_rows))
    if rows >= all_rows:
        return all_rows
    made, full = (parts_of(key, tensor) for tensor in (_outline(source, grid, rows), outline))
    apart = all(part.shape == (rows, *full[name].shape[1:]) and full[name].dim() for name, part in made.items())
    return rows if apart else all_rows


def _made(source: Source, grid: GridFile | None, first: int, rows: int, device: str) -> Any:
    """`rows` of an entry from `first` on, as they ship."""
    if source.target is None:
        return (source.place.read(first, rows) if source.place.shape else source.place.read()).to(source.dtype)
    if grid is not None:
        quantised = grid.read(source.layer, first, rows, device)
    else:
        weight = source.place.read(first, rows).to(device).to(source.dtype)
        quantised = quantise_weight(weight, source.target, source.group_size, source.rounding)
    return source.target.tensor(quantised, source.dtype)
