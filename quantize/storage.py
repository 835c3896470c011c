"""Quantised checkpoints on disk: written whole or not at all, in the form that plain `from_pretrained` loads.

The tensors' names and the files' metadata are those of `torchao.prototype.safetensors`, as transformers' own
`save_pretrained` writes them; but no copy of the model is made on the way, and a tensor may come in parts.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantize.errors import UserError
from quantize.tensor_files import TensorWriter

if TYPE_CHECKING:
    from torch import Tensor, nn

SHARD_SIZE = "5GB"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GIB = 2**30


# ---------------------------------------------------------------------- folders


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Gives a folder beside `output` that takes its place when the block ends well, and is gone when it does not.

    What a killed process left in that folder is cleared first. An `output` that is there already stays until the end.

    Raises:
        UserError: the disk is full.
    """
    partial, old = (output.with_name(f"{output.name}.{ending}") for ending in ("partial", "replaced"))
    _bring_back(old, output)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_folder(partial)
        if output.exists():
            output.rename(old)
        partial.rename(output)
        _sync(output.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{output} cannot be written: {error.strerror} ({_free(output.parent) / _GIB:.1f} GiB are free there now); "
            "nothing was left of it, and its source is as it was: make room, or name another --output"
        ) from error
    finally:
        _bring_back(old, output)
        shutil.rmtree(partial, ignore_errors=True)


def _bring_back(old: Path, output: Path) -> None:
    """Undoes a replacement that ended between its two renames."""
    if old.exists() and not output.exists():
        old.rename(output)


def refuse_full(folder: Path, needed: int) -> None:
    """Raises UserError where `folder`'s disk has no room for so many bytes."""
    free = _free(folder)
    if needed > free:
        raise UserError(
            f"{folder.parent} has no room: the result takes {needed / _GIB:.2f} GiB, {free / _GIB:.2f} GiB are free; "
            "nothing was written: make room, or name another --output"
        )


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def sync_folder(folder: Path) -> None:
    """Flushes a folder's files to disk, so that a rename after it never leaves half a checkpoint."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- weights


def parts_of(key: str, tensor: Any) -> dict[str, Tensor]:
    """The tensors that a file holds of the entry `key`, by their names there: a torchao tensor is several."""
    if type(tensor) is torch.Tensor:
        return {key: tensor}
    module, leaf = key.rsplit(".", 1)
    names = [*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", ())]
    parts = {name: getattr(tensor, name) for name in names}
    return {f"{module}._{leaf}_{name}": part for name, part in parts.items() if part is not None}


def torchao_metadata(state: Mapping[str, Any]) -> dict[str, str]:
    """What the files' headers say of a state dict, for torchao to rebuild its tensors; their data is not read."""
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    def describe(tensor: Any) -> str:
        if type(tensor) is torch.Tensor:
            return json.dumps({"_type": "Tensor"})
        return json.dumps(tensor, cls=TensorSubclassAttributeJSONEncoder)

    return {**{key: describe(tensor) for key, tensor in state.items()}, "tensor_names": json.dumps(list(state))}


def write_weights(
    folder: Path,
    outlines: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    data: Iterable[tuple[str, int, Tensor]],
    *,
    stem: str = "model",
    weights: int = 0,
    max_shard_size: int | str = SHARD_SIZE,
) -> None:
    """Writes safetensors files into `folder` whose sizes are known before their contents.

    Args:
        outlines: name -> tensor whose shape and dtype it has, in the order in which they are shared among files.
        metadata: what every file's header says.
        data: (name, first row, rows), in any order; together they are all of every tensor.
        stem: the files' name, before -00001-of-00002 and .safetensors.
        weights: the model's number of weights, for the index.

    Raises:
        UserError: the disk has no room for them.
    """
    writer = TensorWriter(folder, outlines, metadata, max_shard_size=max_shard_size, stem=stem, weights=weights)
    refuse_full(folder, writer.size)
    try:
        writer.open()
        for name, first, rows in data:
            writer.write(name, rows, first)
        writer.close()
    finally:
        writer.abandon()


def save_model(model: Any, folder: Path, *, max_shard_size: int | str = SHARD_SIZE) -> None:
    """Writes a model whose quantised weights are torchao's tensors, as `save_pretrained` does, without its copies.

    Args:
        model: transformers model with the marks of its format (see `quantize.convert.quantise_`).
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    metadata = torchao_metadata(state)
    flat = {name: part for key, tensor in state.items() for name, part in parts_of(key, tensor).items()}
    for key in model._keys_to_ignore_on_save or ():
        flat.pop(key, None)
    flat = remove_tied_weights_from_state_dict(flat, model)
    flat = revert_weight_conversion(model, flat)
    write_weights(
        folder, flat, metadata, ((name, 0, part) for name, part in flat.items()),
        weights=model.num_parameters(), max_shard_size=max_shard_size,
    )  # fmt: skip
    save_settings(model, folder)


def save_settings(model: Any, folder: Path) -> None:
    """Writes config.json and generation_config.json as `save_pretrained` does; the model may lack its weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load_quantized(folder: Path | str, *, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """A model with torchao's tensors, from a folder in transformers' form or in the packed one (`quantize.packed`).

    The packed form is restored in a temporary folder first, which takes the disk space of the unpacked checkpoint.
    """
    from quantize.convert import load_plain
    from quantize.packed import is_packed, unpack_folder

    folder = Path(folder)
    if not is_packed(folder):
        return load_plain(folder, device=device, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="unpacked-") as place:
        unpack_folder(folder, Path(place) / folder.name)
        return load_plain(Path(place) / folder.name, device=device, trust_remote_code=trust_remote_code)
