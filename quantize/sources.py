"""What may be converted: a folder in transformers' format, or a hub id; all else is refused before any work.

Judged by names, config.json and the files' headers: no model is built, and no code of the checkpoint runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.files import is_neither, read_mapping, weight_files

_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


def find_source(name: str, root: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of a checkpoint that a user names by path, or by its hub id (OWNER/NAME), which is downloaded.

    Raises:
        UserError: there is neither, or the hub cannot give it.
    """
    from quantize import hub

    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise is_neither(name, root, "a folder with a config.json")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise is_neither(name, root, "a folder with a config.json")
    try:
        return hub.download_model(name, revision, with_code=trust_remote_code)
    except hub.HubProblem as error:
        raise UserError(f"{name} is neither a run nor a folder, and as a hub id: {error}") from error


def check_source(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Whether a folder is a whole, unquantised checkpoint of a causal language model.

    Raises:
        UserError: what is wrong with it, and what to do.
    """
    from quantize.tensor_files import read_folder

    if not (folder / "config.json").is_file():
        adapter = " (an adapter: merge it into its model first)" if (folder / "adapter_config.json").is_file() else ""
        raise UserError(f"{folder} has no config.json{adapter}; give a folder in transformers format")
    settings = read_mapping(folder / "config.json")
    if "ongrid_packed" in settings:
        raise UserError(f"{folder} is quantised already, in the packed form; unpack it with: --unpack")
    quantised = settings.get("quantization_config") or (settings.get("text_config") or {}).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "some method")
        raise UserError(f"{folder} is quantised already ({method}); give the 16-bit model that it was made from")
    if settings.get("auto_map") and not trust_remote_code and not is_known(settings.get("model_type")):
        raise UserError(
            f"{folder} brings Python code of its own ({settings['auto_map'].get('AutoModelForCausalLM')}), which is "
            "not run unasked; read it, then say --trust-remote-code"
        )
    refuse_other_models(folder, settings)
    if not weight_files(folder):
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        found = f"only {others[0]}, a format that can run code when it is read" if others else "no weights"
        raise UserError(
            f"{folder} has no model.safetensors ({found}); save it again where you trust it: "
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        )
    read_folder(folder)


def refuse_other_models(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError where config.json is of something else than a causal language model."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    kind, classes = settings.get("model_type"), settings.get("architectures") or []
    if "AutoModelForCausalLM" in (settings.get("auto_map") or {}):
        return
    what = f"{folder} is a {classes[0] if classes else kind or 'model of no known type'}"
    if settings.get("is_encoder_decoder"):
        raise UserError(f"{what}, an encoder-decoder; only causal language models are quantised here")
    causal = {name for entry in CAUSAL.values() for name in ([entry] if isinstance(entry, str) else entry)}
    encoder = kind in MASKED and not settings.get("is_decoder")
    fits = any(name in causal for name in classes) if classes else not encoder
    if kind not in CAUSAL or not fits:
        raise UserError(f"{what}, which is no causal language model; only those are quantised here")


def is_known(model_type: str | None) -> bool:
    """Whether transformers has this model itself. Read from its source: unsloth must be imported before it."""
    spec = importlib.util.find_spec("transformers")
    places = (spec.submodule_search_locations or []) if spec is not None else []
    files = (path for place in places for path in Path(place, "models", "auto").glob("*.py"))
    return any(f'"{model_type}"' in path.read_text(encoding="utf-8") for path in files)
