"""The packed form of a quantised checkpoint: integers of 2 to 7 bits at their own width, restored to the last bit.

torchao's Intx tensors hold every integer in a byte, whatever its width. Here eight neighbours of a row share as many
bytes as an integer has bits (the first in the lowest bits, little-endian), and zero points that are all zero are left
out. All else, the headers included, is as in the unpacked folder. Files are named packed*.safetensors, and config.json
names a model type that no library takes: plain `from_pretrained` refuses it and says what to do, rather than load
weights at random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from quantize.errors import UserError
from quantize.files import read_mapping, weight_files
from quantize.storage import replacing, write_weights
from quantize.tensor_files import Place, read_folder

if TYPE_CHECKING:
    from torch import Tensor

_MARK = "ongrid_packed"  # in config.json and in the files' metadata
_MODEL_TYPE = "packed by ongrid; unpack it first with: quantize convert FOLDER --unpack --output NEW"
_VERSION = 1
_STEM = "packed"
_PIECE = 2**22  # weights at a time


def is_packed(folder: Path) -> bool:
    """Whether a folder holds the packed form."""
    path = folder / "config.json"
    return path.is_file() and _MARK in read_mapping(path)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Signed integers (..., I) of `bits` -> bytes (..., ceil(I / 8) * bits), uint8.

    Args:
        values: int8, from -2^(bits-1) to 2^(bits-1) - 1.
        bits: 2 to 8.
    """
    raised = functional.pad(values.to(torch.int64) + 2 ** (bits - 1), (0, -values.shape[-1] % 8))
    shifts = torch.arange(8, device=values.device) * bits
    words = (raised.unflatten(-1, (-1, 8)) << shifts).sum(-1, keepdim=True)  # eight integers a word; no bit overlaps
    packed: Tensor = words.view(torch.uint8)[..., :bits].flatten(-2).contiguous()
    return packed


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """What `pack_bits` packed: int8 (..., columns)."""
    words = functional.pad(packed.unflatten(-1, (-1, bits)), (0, 8 - bits)).contiguous().view(torch.int64)
    shifts = torch.arange(8, device=packed.device) * bits
    raised = (words >> shifts) & (2**bits - 1)
    values: Tensor = (raised - 2 ** (bits - 1)).to(torch.int8).flatten(-2)[..., :columns].contiguous()
    return values


def pack_folder(source: Path, output: Path) -> None:
    """Writes the packed form of a folder with torchao's tensors, atomically.

    Raises:
        UserError: the folder is not quantised by torchao, or the disk is full.
    """
    settings = read_mapping(source / "config.json")
    method = (settings.get("quantization_config") or {}).get("quant_method")
    if method != "torchao":
        said = f"quantised by {method}" if method else "not quantised"
        raise UserError(f"{source} is {said}: only what torchao quantised is packed; say --scheme for a 16-bit model")
    places, metadata = read_folder(source)
    coded = _codes(places, metadata)

    def data() -> Iterator[tuple[str, int, Tensor]]:
        for name, place in places.items():
            code = coded.get(name)
            if code is None or "bits" in code:
                for first, rows in _pieces(place):
                    yield name, first, rows if code is None else pack_bits(rows, code["bits"])

    outlines = {}
    for name, place in places.items():
        code = coded.get(name)
        if code is None:
            outlines[name] = place.outline()
        elif "bits" in code:
            width = (place.shape[-1] + 7) // 8 * code["bits"]
            outlines[name] = torch.empty((*place.shape[:-1], width), dtype=torch.uint8, device="meta")
    with replacing(output) as partial:
        write_weights(partial, outlines, {**metadata, _MARK: json.dumps(coded)}, data(), stem=_STEM)
        _write_json(partial / "config.json", {"model_type": _MODEL_TYPE, _MARK: _VERSION, "config": settings})
        _copy_others(source, partial)


def unpack_folder(source: Path, output: Path) -> None:
    """Writes torchao's form of a packed folder, atomically: the same tensors, headers and settings as before packing.

    Raises:
        UserError: the folder is not packed, or by another version, or damaged.
    """
    if not is_packed(source):
        raise UserError(f"{source} is not packed; plain transformers load it as it is")
    settings = read_mapping(source / "config.json")
    if settings[_MARK] != _VERSION:
        raise UserError(f"{source} was packed by another version of ongrid ({settings[_MARK]}, here {_VERSION})")
    places, metadata = read_folder(source, _STEM)
    if _MARK not in metadata:
        raise UserError(f"{source} lacks {_STEM}.safetensors, or it was not written by ongrid; copy the whole folder")
    coded: dict[str, Any] = json.loads(metadata.pop(_MARK))
    metadata.pop("format", None)
    outlines = {
        name: place.outline() if name not in coded else _outline(coded[name]) for name, place in places.items()
    } | {name: _outline(code) for name, code in coded.items() if "zeros" in code}

    def data() -> Iterator[tuple[str, int, Tensor]]:
        for name, place in places.items():
            code = coded.get(name)
            for first, rows in _pieces(place):
                yield name, first, rows if code is None else unpack_bits(rows, code["bits"], code["shape"][-1])
        for name, code in coded.items():
            if "zeros" in code:
                yield name, 0, torch.zeros(code["shape"], dtype=getattr(torch, code["zeros"]))

    with replacing(output) as partial:
        write_weights(partial, outlines, metadata, data())
        _write_json(partial / "config.json", settings["config"])
        _copy_others(source, partial)


def _codes(places: Mapping[str, Place], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """How tensors are packed, by their names in the file: {bits, shape} or {zeros: dtype, shape}; others are not."""
    coded: dict[str, dict[str, Any]] = {}
    for key in json.loads(metadata.get("tensor_names", "[]")):
        said = json.loads(metadata[key])
        module, _, leaf = key.rpartition(".")
        integers, zeros = f"{module}._{leaf}_qdata", f"{module}._{leaf}_zero_point"
        if said["_type"] == "IntxUnpackedToInt8Tensor":
            bits = int(said["_data"]["target_dtype"]["_data"].removeprefix("int"))
            if bits < 8:
                coded[integers] = {"bits": bits, "shape": list(places[integers].shape)}
        symmetric = said["_type"] in ("IntxUnpackedToInt8Tensor", "Int8Tensor") and zeros in places
        if symmetric and not places[zeros].read().any():
            shape, dtype = list(places[zeros].shape), str(places[zeros].dtype).removeprefix("torch.")
            coded[zeros] = {"zeros": dtype, "shape": shape}
    return coded


def _outline(code: Mapping[str, Any]) -> Tensor:
    return torch.empty(code["shape"], dtype=getattr(torch, code.get("zeros", "int8")), device="meta")


def _pieces(place: Place) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a tensor, a piece at a time."""
    if not place.shape:
        yield 0, place.read()
        return
    rows = max(1, _PIECE * place.dtype.itemsize // max(1, place.row_bytes))
    for first in range(0, place.shape[0], rows):
        yield first, place.read(first, rows)


def _write_json(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_others(source: Path, output: Path) -> None:
    """Tokenizer, generation settings and the like; the weights and config.json are written anew."""
    written = {"config.json"}
    for stem in ("model", _STEM):
        written |= {f"{stem}.safetensors.index.json", *(path.name for path in weight_files(source, stem))}
    for path in source.iterdir():
        if path.is_file() and path.name not in written:
            shutil.copyfile(path, output / path.name)
