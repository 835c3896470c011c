"""safetensors files in parts: read by rows and written in place, so that memory holds a piece of one tensor at a time.

The library's own functions map whole files or take a whole state dict. The format (8 bytes of header length, a JSON
header, the data) is read here by its public description; the library still judges every file before it is trusted.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantize.errors import UserError
from quantize.files import weight_files

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip
_AHEAD = 2**25
"""Bytes at most that wait to be written; a larger part waits alone."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        start: first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first dimension."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.dtype.itemsize * math.prod(self.shape)

    def outline(self) -> Tensor:
        """The tensor without its data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self, first: int = 0, rows: int | None = None) -> Tensor:
        """The tensor, or `rows` of it from `first` on, in memory of its own."""
        if rows is None:
            shape, start = self.shape, self.start
        else:
            shape, start = (min(rows, self.shape[0] - first), *self.shape[1:]), self.start + first * self.row_bytes
        found = torch.empty(shape, dtype=self.dtype)
        view, done = _bytes_of(found), 0
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            while done < len(view):
                got = os.preadv(descriptor, [view[done:]], start + done)
                if not got:
                    raise UserError(f"{self.file} ends before its tensors do: it changed while it was read")
                done += got
        finally:
            os.close(descriptor)
        return found


def read_places(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Every tensor's place in a file, and the file's metadata.

    Raises:
        UserError: the file is torn, or no safetensors at all.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # checks lengths, offsets and types of the whole file
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); copy or download it again") from error
    metadata = header.pop("__metadata__", {})
    unknown = {tensor["dtype"] for tensor in header.values()} - _DTYPES.keys()
    if unknown:
        raise UserError(f"{path} holds numbers of a type that is not known here: {', '.join(sorted(unknown))}")
    places = {
        name: Place(path, _DTYPES[tensor["dtype"]], tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }
    return places, metadata


def read_folder(folder: Path, stem: str = "model") -> tuple[dict[str, Place], dict[str, str]]:
    """The tensors of a checkpoint folder and the metadata of its files, as `read_places` has them."""
    places: dict[str, Place] = {}
    metadata: dict[str, str] = {}
    for path in weight_files(folder, stem):
        found, said = read_places(path)
        places |= found
        metadata |= said
    return places, metadata


class TensorWriter:
    """Safetensors files whose tensors are written in any order and in parts: `open`, `write` each, `close`.

    A thread writes while the next part is made.

    Args:
        folder: where the files will lie.
        outlines: name -> tensor whose shape and dtype it has, in the order in which they are shared among files.
        metadata: what every file's header says.
        max_shard_size: bytes ("5GB") that a file may have; a larger tensor has one of its own.
        stem: files are named `stem`.safetensors, or `stem`-00001-of-00002.safetensors and so on with an index.
        weights: the model's number of weights, for the index.
    """

    def __init__(
        self,
        folder: Path,
        outlines: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        *,
        max_shard_size: int | str = "5GB",
        stem: str = "model",
        weights: int = 0,
    ) -> None:
        from huggingface_hub import split_state_dict_into_shards_factory

        split = split_state_dict_into_shards_factory(
            dict(outlines),
            get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self.places: dict[str, Place] = {}
        self._folder, self._stem = folder, stem
        self._metadata = {**metadata, "format": "pt"}
        self._headers: dict[Path, bytes] = {}
        self._weights, self._split = weights, split
        self._open: dict[Path, int] = {}
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future[None], int]] = deque()
        for name, keys in split.filename_to_tensors.items():
            self._plan(folder / name, {key: outlines[key] for key in keys})

    @property
    def size(self) -> int:
        """Bytes that the files will have."""
        return sum(len(header) for header in self._headers.values()) + sum(p.size for p in self.places.values())

    def _plan(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Gives each tensor its place; wide numbers first, so that all are aligned, as the library does."""
        header: dict[str, Any] = {"__metadata__": self._metadata}
        offset, places = 0, {}
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            place = Place(path, tensors[name].dtype, tuple(tensors[name].shape), offset)
            places[name], offset = place, offset + place.size
            header[name] = {
                "dtype": _NAMES[place.dtype], "shape": list(place.shape), "data_offsets": [place.start, offset],
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[path] = len(text).to_bytes(8, "little") + text
        start = 8 + len(text)
        self.places |= {n: Place(path, p.dtype, p.shape, start + p.start) for n, p in places.items()}

    def open(self) -> None:
        """Creates the files and takes their room on the disk, so that a full one says so before the work."""
        for path, header in self._headers.items():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            self._open[path] = descriptor
            size = len(header) + sum(place.size for place in self.places.values() if place.file == path)
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(descriptor, 0, size)
            _write_all(descriptor, memoryview(header), 0)

    def write(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Writes a tensor, or its rows from `first` on. It must stay as it is until `close`.

        Raises:
            OSError: this part or one before it could not be written.
        """
        place = self.places[name]
        assert tensor.dtype == place.dtype and tuple(tensor.shape[1:]) == place.shape[1:], name
        data = _bytes_of(tensor.detach().cpu().contiguous())
        while self._waiting and sum(size for _, size in self._waiting) + len(data) > _AHEAD:
            self._waiting.popleft()[0].result()
        done = self._thread.submit(_write_all, self._open[place.file], data, place.start + first * place.row_bytes)
        self._waiting.append((done, len(data)))

    def close(self) -> None:
        """Flushes the files to the disk and writes the index where there are several.

        Raises:
            OSError: a part could not be written.
        """
        while self._waiting:
            self._waiting.popleft()[0].result()
        for path in list(self._open):
            descriptor = self._open.pop(path)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if self._split.is_sharded:
            totals = {"total_parameters": self._weights, **self._split.metadata}
            index = {"metadata": totals, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / f"{self._stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def abandon(self) -> None:
        """Ends the thread, and closes what is open after a failure."""
        self._thread.shutdown(cancel_futures=True)
        for path in list(self._open):
            os.close(self._open.pop(path))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's, for Python < 3.12


def _write_all(descriptor: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], start + done)
