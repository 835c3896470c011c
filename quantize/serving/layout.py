"""Which layers vLLM takes for quantised, by the rules of its TorchAOConfig, beside those that the files hold so.

Only headers are read: no torch. The rules are those of vllm/model_executor/layers/quantization/torchao.py, 0.23.0; the
files' form is that of torchao.prototype.safetensors (`quantize.storage`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.files import weight_files
from quantize.names import fused_names

_TABLES = re.compile(r"embed|^(wte|wpe|lm_head|output_projection)$")
"""Last parts of names that are no linear layers to vLLM: tables of tokens and positions, and the head."""
_INSIDE = "model.language_model."
"""How the layers of a model inside another are called in transformers; vLLM has them below language_model.model."""
_PLAIN = "Tensor"
_SHOWN = 3


@dataclass(frozen=True)
class Weight:
    """One entry of a checkpoint.

    Attributes:
        kind: torchao's class of it; "Tensor" = it is not quantised.
        settings: what the header says of it beside its class, as text: equal for layers that are quantised alike.
        dimensions: how many it has, of one that is not quantised.
    """

    kind: str
    settings: str = ""
    dimensions: int = 0

    @property
    def quantised(self) -> bool:
        """Whether it is one of torchao's."""
        return self.kind != _PLAIN


def read_weights(folder: Path) -> dict[str, Weight]:
    """Name of each entry -> what it is.

    Raises:
        UserError: there are no safetensors, one is missing, or a header cannot be read.
    """
    found: dict[str, Weight] = {}
    for path in _files(folder):
        header = _header(path)
        metadata = header.pop("__metadata__", None) or {}
        for name, entry in header.items():
            found.setdefault(name, Weight(_PLAIN, dimensions=len(entry.get("shape", ()))))
        try:
            names = json.loads(metadata.get("tensor_names", "[]"))
            kinds = {name: json.loads(metadata[name]) for name in names if name in metadata}
        except ValueError as error:
            raise UserError(f"{path}: what torchao wrote in its header cannot be read ({error})") from error
        for name, said in kinds.items():
            if said.get("_type") not in (None, _PLAIN):
                data = {key: value for key, value in (said.get("_data") or {}).items() if key != "shape"}
                found[name] = Weight(said["_type"], json.dumps(data, sort_keys=True))
    return found


def _files(folder: Path) -> list[Path]:
    found = weight_files(folder)
    if not found:
        raise UserError(
            f"{folder} has no model.safetensors, nor an index that names several: give the whole folder of a "
            "checkpoint; pickled weights (.bin, .pt) are not served here"
        )
    return found


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length if length < path.stat().st_size else 0)
            found = json.loads(text)
            ends = [entry["data_offsets"][1] for name, entry in found.items() if name != "__metadata__"]
            if path.stat().st_size != 8 + length + max(ends, default=0):
                raise ValueError("it ends before its tensors do")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again") from error
    return found  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- vLLM's rules


def is_taken(layer: str, settings: Mapping[str, Any]) -> bool:
    """Whether vLLM makes this linear layer a quantised one: `TorchAOConfig.get_quant_method`.

    Args:
        layer: vLLM's name of it.
        settings: quantization_config of config.json.
    """
    chosen = settings["quant_type"]["default"]
    named = _named(chosen)
    skipped = [*(settings.get("modules_to_not_convert") or ()), *(key for key, value in named.items() if value is None)]
    if any(layer == name or f".{name}." in f".{layer}." for name in skipped):
        return False
    if chosen.get("_type") not in ("FqnToConfig", "ModuleFqnToConfig"):
        return True
    if layer in named:
        return named[layer] is not None
    for pattern, value in named.items():
        if pattern.startswith("re:") and re.fullmatch(pattern[3:], layer):
            return value is not None
    return named.get("_default") is not None


def _named(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config by names: torchao writes them twice, for readers of two ages."""
    data = chosen.get("_data")
    if not isinstance(data, dict):
        return {}
    found = data.get("module_fqn_to_config") or data.get("fqn_to_config")
    return found if isinstance(found, dict) else {}


def _names(settings: Mapping[str, Any]) -> list[str]:
    """All layers that config.json names one by one."""
    return [*(settings.get("modules_to_not_convert") or ()), *_named(settings["quant_type"]["default"])]


def find_faults(weights: Mapping[str, Weight], settings: Mapping[str, Any]) -> list[str]:
    """Why vLLM would not load these weights under this config, one thing each; names of layers at most three.

    Args:
        weights: of `read_weights`.
        settings: quantization_config of config.json.
    """
    tables = [name for name, weight in weights.items() if weight.quantised and _TABLES.search(_leaf(name))]
    experts = [name for name, weight in weights.items() if weight.quantised and ".experts." in f".{name}."]
    faults = []
    if tables:
        faults.append(
            f"{_some(tables)}: vLLM keeps the embedding and lm_head in 16 bit, and cannot load quantised ones: "
            "int8-int4-mobile is for phones"
        )
    if experts:
        faults.append(
            f"{_some(experts)}: vLLM cannot load fused experts in torchao's layouts: serve the 16-bit weights"
        )
    linear = {
        name.removesuffix(".weight"): weight
        for name, weight in weights.items()
        if name.endswith(".weight") and not _TABLES.search(_leaf(name)) and ".experts." not in f".{name}."
        and (weight.quantised or weight.dimensions == 2)
    }  # fmt: skip
    names = _names(settings)
    inside = [name for name in names if name.removeprefix("re:").replace("\\", "").startswith("model.")]
    if inside and any(name.startswith(_INSIDE) for name in (*weights, *inside)):
        return [
            *faults, f"config.json names layers inside another model ({_some(inside)}), which vLLM has under other "
            "names, and would take for what they are not: serve its 16-bit weights, or convert all layers alike",
        ]  # fmt: skip
    try:
        return faults + list(_layer_faults(linear, settings))
    except re.error as error:
        return [*faults, f"config.json names layers by a pattern that is none ({error})"]


def _layer_faults(linear: Mapping[str, Weight], settings: Mapping[str, Any]) -> Iterator[str]:
    partly, unlike, lost, invented = list[str](), list[str](), list[str](), list[str]()
    for layer, members in _layers(linear):
        kept = [name for name in members if not linear[name].quantised]
        if kept and len(kept) < len(members):
            partly.append(f"{layer} ({', '.join(map(_last, kept))} in 16 bit)")
        elif len({linear[name] for name in members if linear[name].quantised}) > 1:
            unlike.append(layer)
        elif not kept and not is_taken(layer, settings):
            lost.append(layer)
        elif kept and is_taken(layer, settings):
            invented.append(layer)
    joined = "vLLM joins q_proj, k_proj and v_proj into qkv_proj, gate_proj and up_proj into gate_up_proj"
    if partly:
        yield (
            f"{_some(partly)}: {joined}, each quantised as a whole or not at all: convert or train again with all of "
            "its parts or none (--skip q_proj k_proj v_proj; of a run --quantize.skip=q_proj,k_proj,v_proj)"
        )
    if unlike:
        yield f"{_some(unlike)}: {joined}, and cannot join what is quantised differently: convert again, all alike"
    if lost:
        yield (
            f"{_some(lost)}: quantised, but config.json does not say so under vLLM's names, and vLLM would take them "
            "for 16 bit: convert again with this version of ongrid"
        )
    if invented:
        yield (
            f"{_some(invented)}: not quantised, but by config.json vLLM would take them for quantised: convert again "
            "with this version of ongrid"
        )


def _layers(linear: Mapping[str, Weight]) -> Iterator[tuple[str, Sequence[str]]]:
    """(vLLM's name, names in the file) of each layer."""
    fused = fused_names(list(linear))
    parts = {part for members in fused.values() for part in members}
    yield from fused.items()
    yield from ((name, (name,)) for name in linear if name not in parts)


def _leaf(name: str) -> str:
    """`lm_head` of `lm_head.weight`."""
    return _last(name.removesuffix(".weight"))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
