"""16-bit checkpoint in, really quantised checkpoint out: the finalize step's engine and `quantize convert`'s."""

from __future__ import annotations

import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize import experts
from quantize.algorithms.choose import check_fit
from quantize.algorithms.rounding import pick_rounding
from quantize.calibrate import Recipe, choose_by
from quantize.errors import UserError
from quantize.grid import GridFile, load_grid, quantised_weights
from quantize.layers import Coverage, embedding_name, find_weight, select_layers, untie, weight_key
from quantize.names import fused_names
from quantize.numerics import Quantised
from quantize.record import write_record
from quantize.release.base_model import find_base
from quantize.schemes import Scheme, Target
from quantize.sources import check_source
from quantize.storage import SHARD_SIZE, replacing, save_model
from quantize.stream import Source, plan, stream, why_not
from quantize.tensor_files import Place, read_folder

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*.model")


def load_plain(
    folder: Path, *, dtype: str | None = None, device: str = "cpu", trust_remote_code: bool = False, **options: Any
) -> nn.Module:
    """A checkpoint through plain transformers: safetensors only, and code from the checkpoint only where asked for.

    Fused experts run one by one, quantised or not, so that what is compared differs in nothing else.
    """
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
    if experts.has_experts(model):
        model.set_experts_implementation("eager")
        experts.let_tensors_select()
    return model.eval()  # type: ignore[no-any-return]


def inspect_model(folder: Path, *, trust_remote_code: bool = False, dtype: str | None = None) -> nn.Module:
    """The model's modules without its weights (meta device), in `dtype` or in that of its config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]
            config, trust_remote_code=trust_remote_code, **({"dtype": getattr(torch, dtype)} if dtype else {})
        )


def torchao_config(
    model: nn.Module, scheme: Scheme, target: Target, group_size: int | None, coverage: Coverage
) -> dict[str, Any]:
    """Keyword arguments of transformers' TorchAoConfig for the covered layers: what config.json says of the weights.

    A layer that does not fit is named out rather than left to the library, which would skip it in silence or fail; so
    are fused experts, which the library only takes by name. vLLM looks modules up here, and some under the name of the
    layer that it makes of several.
    """
    from torchao.quantization import FqnToConfig

    embedding = embedding_name(model)
    by_name = any(weight_key(model, name) == name for name in coverage.layers)  # matrices of fused experts
    uneven = [name for name in coverage.skipped if name.rsplit(".", 1)[-1] not in scheme.skip]
    if not uneven and not by_name and scheme.embedding is None:
        return {"quant_type": target.config(group_size)}
    entries: OrderedDict[str, Any] = OrderedDict()
    if scheme.embedding is not None:
        entries[embedding] = scheme.embedding.config(None)
    for name in (*coverage.layers, *fused_names(coverage.layers)):
        entries[name] = target.config(group_size)
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
    recipe: Recipe = Recipe(),  # noqa: B008  frozen
    named: str | None = None,
    revision: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Coverage:
    """Quantises the 16-bit checkpoint `source` for `target` and writes `output`, atomically, with its record.

    The weights go from file to file, a piece of a layer at a time, where the checkpoint's tensors are the model's;
    where transformers renames, joins or splits them (or runs the checkpoint's own code), and for algorithms that must
    see the whole model, it is loaded whole.

    Args:
        source: transformers checkpoint in safetensors.
        skip: names of layers that keep 16 bit beyond the scheme's own (see `quantize.names`).
        output: folder to write; replaced as a whole when everything is on disk.
        dtype: dtype of the weights that stay unquantised, and of the scales ("float32", "bfloat16").
        device: where to convert; CUDA layouts need CUDA.
        trust_remote_code: run the checkpoint's own model code.
        grid: folder of the weights as they were trained (`quantize.grid`); None rounds `source`.
        recipe: what chooses the numbers; with a grid they are chosen already.
        named: how the user named `source`, for ongrid.json (`quantize.record`). revision: that of a hub id.
        max_shard_size: bytes ("5GB") of a file.
        progress: called with (tensors done, all).

    Raises:
        UserError: the scheme reaches no layer of this model, the source is no whole checkpoint of a causal language
            model in 16 or 32 bit, or the disk is full.
    """
    check_source(source, trust_remote_code=trust_remote_code)
    check_fit(recipe.algorithms, scheme, target)
    if grid is not None and recipe.algorithms:
        raise UserError(
            f"{', '.join(recipe.algorithms)}: these weights were trained on their grid, and choosing other numbers "
            "would throw the training away; leave the algorithms out"
        )
    outline = inspect_model(source, trust_remote_code=trust_remote_code, dtype=dtype)
    coverage = select_layers(outline, scheme, group_size, target, skip)
    if not coverage.layers:
        reasons = "; ".join(sorted(set(coverage.skipped.values())))
        raise UserError(f"{scheme.name} reaches no layer of {source}: {reasons or 'it has no linear layer'}")
    about: dict[str, Any] = {
        "source": named or str(source), "revision": revision, "scheme": scheme.name, "target": target.name,
        "group_size": group_size, "skip": list(skip), "dtype": dtype, "algorithms": list(recipe.algorithms),
        "calibration": None, "notes": [], "trained": grid is not None, "coverage": coverage.as_dict(),
        "license": dict(find_base(str(source)).license) or None,
    }  # fmt: skip
    places, _ = read_folder(source)
    why = None if recipe.loads_model else why_not(outline, places, getattr(torch, dtype))
    if why:
        print(f"loading the whole model: {why}", file=sys.stderr)
    with replacing(output) as partial:
        if why or recipe.loads_model:
            model: Any = load_plain(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            numbers = load_grid(grid, device) if grid else None
            if recipe.algorithms:
                found, about["calibration"] = choose_by(
                    recipe, model, lambda: load_tokenizer(source, trust_remote_code), scheme, target, group_size,
                    coverage, progress,
                )  # fmt: skip
                numbers, about["notes"] = found.grid, found.notes
            quantise_(model, scheme, target, group_size, coverage, numbers)
            save_model(model, partial, max_shard_size=max_shard_size)
        else:
            sources = _sources(outline, places, scheme, target, group_size, coverage, pick_rounding(recipe.algorithms))
            stream(
                outline, sources, partial, grid=GridFile(grid) if grid else None, device=device,
                max_shard_size=max_shard_size, progress=progress,
            )  # fmt: skip
        copy_companions(source, partial)
        write_record(partial, about)
    return coverage


def _sources(
    outline: Any,
    places: Mapping[str, Place],
    scheme: Scheme,
    target: Target,
    group_size: int | None,
    coverage: Coverage,
    rounding: str,
) -> dict[str, Source]:
    """What each entry of a streamed checkpoint is made from; the model without weights is untied and marked for it."""
    ties = untied(outline) if scheme.embedding is not None else {}
    chosen = dict.fromkeys(coverage.layers, (target, group_size, rounding))
    if scheme.embedding is not None:
        chosen[embedding_name(outline)] = (scheme.embedding, None, "rtn")
    mark_quantised(outline, scheme, target, group_size, coverage)
    return plan(outline, places, chosen, ties)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """A checkpoint's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def untied(model: Any) -> dict[str, str]:
    """Unties the model; key of each weight that is its own now -> key of the one that it shared."""
    ties = dict(model.all_tied_weights_keys)
    untie(model)
    return ties


@torch.no_grad()
def quantise_(
    model: Any,
    scheme: Scheme,
    target: Target,
    group_size: int | None,
    coverage: Coverage,
    grid: Mapping[str, Quantised] | None = None,
) -> None:
    """Gives the covered layers of a plain model torchao's tensors, in place; `storage.save_model` then writes them.

    Args:
        model: from `load_plain`, in the dtype that ships. A tied lm_head that is quantised gets weights of its own.
        grid: the weights as trained; None rounds the model's own weights to nearest.
    """
    if scheme.embedding is not None:
        untie(model)
    for module, leaf, where, quantised in quantised_weights(model, scheme, target, group_size, coverage.layers, grid):
        weight: Any = module._parameters[leaf]
        if weight.dim() == 3:
            tensor = experts.stack([where.tensor(part, weight.dtype) for part in experts.split(quantised, len(weight))])
        else:
            tensor = where.tensor(quantised, weight.dtype)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    mark_quantised(model, scheme, target, group_size, coverage)
    _assert_quantised(model, coverage)


def mark_quantised(model: Any, scheme: Scheme, target: Target, group_size: int | None, coverage: Coverage) -> None:
    """Leaves behind what from_pretrained would have, had it quantised: config.json and save_pretrained ask for it."""
    from transformers import TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    settings = TorchAoConfig(**torchao_config(model, scheme, target, group_size, coverage))
    model.hf_quantizer = AutoHfQuantizer.from_config(settings)
    model.config.quantization_config = settings
    model.is_quantized, model.quantization_method = True, settings.quant_method


def _assert_quantised(model: nn.Module, coverage: Coverage) -> None:
    """Fails where the library left a covered layer in 16 bit."""
    weights = {name: getattr(*find_weight(model, name)) for name in coverage.layers}
    plain = [name for name, weight in weights.items() if type(weight.data) is torch.Tensor]
    assert not plain, f"torchao left {len(plain)} layers unquantised, the first is {plain[0]}"


def copy_companions(source: Path, output: Path) -> None:
    """Copies what lies beside the weights: tokenizer, chat template, generation settings, the model's own code."""
    for pattern in (*TOKENIZER_FILES, "generation_config.json", "*.py"):
        for path in source.glob(pattern):
            shutil.copyfile(path, output / path.name)


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
