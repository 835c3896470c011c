"""16-bit checkpoint in, really quantised checkpoint out: the finalize step's engine and `quantize convert`'s."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.errors import UserError
from quantize.grid import quantised_weights
from quantize.layers import Coverage, embedding_name, select_layers, untie
from quantize.numerics import Quantised
from quantize.schemes import Scheme, Target

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*.model")


def load_plain(
    folder: Path, *, dtype: str | None = None, device: str = "cpu", trust_remote_code: bool = False, **options: Any
) -> nn.Module:
    """A checkpoint through plain transformers: safetensors only, and code from the checkpoint only where asked for."""
    from transformers import AutoModelForCausalLM

    if dtype is not None:
        options["dtype"] = getattr(torch, dtype)
    options.setdefault("attn_implementation", "sdpa")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=device,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        **options,
    )
    return model.eval()  # type: ignore[no-any-return]


def inspect_model(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The model's modules without its weights (meta device)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]


def torchao_config(
    scheme: Scheme, target: Target, group_size: int | None, coverage: Coverage, embedding: str
) -> dict[str, Any]:
    """Keyword arguments of transformers' TorchAoConfig for the covered layers: what config.json says of the weights.

    A layer that does not fit is named out rather than left to the library, which would skip it in silence or fail.

    Args:
        embedding: name of the input embedding.
    """
    from torchao.quantization import FqnToConfig

    uneven = [name for name in coverage.skipped if name.rsplit(".", 1)[-1] not in scheme.skip]
    if not uneven and scheme.embedding is None:
        return {"quant_type": target.config(group_size)}
    entries: OrderedDict[str, Any] = OrderedDict()
    if scheme.embedding is not None:
        entries[f"{embedding}.weight"] = scheme.embedding.config(None)
    for name in coverage.layers:
        entries[f"{name}.weight"] = target.config(group_size)
    return {
        "quant_type": FqnToConfig(entries),
        "include_input_output_embeddings": scheme.embedding is not None,
        "modules_to_not_convert": [] if scheme.embedding is not None else None,
    }


def convert_checkpoint(
    source: Path,
    output: Path,
    scheme: Scheme,
    target: Target,
    *,
    group_size: int | None,
    skip: Sequence[str] = (),
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
    grid: Path | None = None,
) -> Coverage:
    """Quantises the 16-bit checkpoint `source` for `target` and writes `output`, atomically.

    Args:
        source: transformers checkpoint in safetensors.
        skip: names of layers that keep 16 bit beyond the scheme's own (see `quantize.names`).
        output: folder to write; replaced as a whole when everything is on disk.
        dtype: dtype of the weights that stay unquantised, and of the scales ("float32", "bfloat16").
        device: where to convert; CUDA layouts need CUDA.
        trust_remote_code: run the checkpoint's own model code.
        grid: folder of the weights as they were trained (`quantize.grid`); None rounds `source` to nearest.

    Raises:
        UserError: the scheme reaches no layer of this model.
    """
    from quantize.grid import load_grid

    model: Any = load_plain(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    coverage = select_layers(model, scheme, group_size, target, skip)
    if not coverage.layers:
        reasons = "; ".join(sorted(set(coverage.skipped.values())))
        raise UserError(f"{scheme.name} reaches no layer of {source}: {reasons}")
    quantise_(model, scheme, target, group_size, coverage, load_grid(grid, device) if grid else None)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    copy_companions(source, partial)
    sync_folder(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return coverage


@torch.no_grad()
def quantise_(
    model: Any,
    scheme: Scheme,
    target: Target,
    group_size: int | None,
    coverage: Coverage,
    grid: Mapping[str, Quantised] | None = None,
) -> None:
    """Gives the covered layers of a plain model torchao's tensors, in place; `save_pretrained` then writes them.

    Args:
        model: from `load_plain`, in the dtype that ships. A tied lm_head that is quantised gets weights of its own.
        grid: the weights as trained; None rounds the model's own weights to nearest.
    """
    from transformers import TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    if scheme.embedding is not None:
        untie(model)
    for module, where, quantised in quantised_weights(model, scheme, target, group_size, coverage.layers, grid):
        dtype = module.weight.dtype
        assert isinstance(dtype, torch.dtype)
        module.weight = nn.Parameter(where.tensor(quantised, dtype), requires_grad=False)
    # What from_pretrained would have left behind had it quantised: save_pretrained asks for it.
    settings = TorchAoConfig(**torchao_config(scheme, target, group_size, coverage, embedding_name(model)))
    model.hf_quantizer = AutoHfQuantizer.from_config(settings)
    model.config.quantization_config = settings
    model.is_quantized, model.quantization_method = True, settings.quant_method
    _assert_quantised(model, coverage)


def _assert_quantised(model: nn.Module, coverage: Coverage) -> None:
    """Fails where the library left a covered layer in 16 bit."""
    plain = [name for name in coverage.layers if type(model.get_submodule(name).weight.data) is torch.Tensor]
    assert not plain, f"torchao left {len(plain)} layers unquantised, the first is {plain[0]}"


def copy_companions(source: Path, output: Path) -> None:
    """Copies what lies beside the weights: tokenizer, chat template, generation settings, the model's own code."""
    for pattern in (*TOKENIZER_FILES, "generation_config.json", "*.py"):
        for path in source.glob(pattern):
            shutil.copyfile(path, output / path.name)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's files to disk, so that a rename after it never leaves half a checkpoint."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def memory_bytes(model: nn.Module) -> int:
    """Bytes of a loaded model's weights, each tied weight once, inner tensors of quantised ones counted."""
    seen: dict[int, int] = {}
    for parameter in [*model.parameters(), *model.buffers()]:
        for tensor in _inner_tensors(parameter.data):
            seen[tensor.data_ptr()] = max(seen.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
    return sum(seen.values())


def _inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    if type(tensor) is torch.Tensor:
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names for inner in _inner_tensors(getattr(tensor, name))]
