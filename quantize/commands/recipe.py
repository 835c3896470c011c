"""Recipes of `quantize convert`: a YAML file with the model and any of the options, as those in configs/release/."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quantize.errors import UserError

DTYPES = ("float32", "bfloat16")
_KEYS = (
    "scheme", "target", "group_size", "skip", "dtype", "revision", "max_shard_size", "packed", "algorithm",
    "calibration", "calibration_samples",
)  # fmt: skip
_LISTS, _NUMBERS = ("skip", "algorithm"), ("group_size", "calibration_samples")


def take_recipe(options: argparse.Namespace) -> None:
    """Fills in what the command line leaves open from the file of --config.

    Raises:
        UserError: it cannot be read, or holds what is no option.
    """
    import yaml

    path = Path(_packaged(str(options.config), "configs/release", "configs", ""))
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise UserError(f"--config {path} holds no mapping; configs/release/ has examples")
    unknown = [str(key) for key in found if key not in ("model", *_KEYS)]
    if unknown:
        hint = "; a config of `train` is none of `quantize convert`" if isinstance(found.get("model"), dict) else ""
        raise UserError(f"--config {path}: unknown {', '.join(unknown)}; it may hold model, {', '.join(_KEYS)}{hint}")
    for key, value in found.items():
        name = "source" if key == "model" else key
        if value is not None and not getattr(options, name):
            value = _checked(path, key, value)
            setattr(options, name, _packaged(value, "") if key == "calibration" else value)


def _packaged(name: str, *folders: str) -> str:
    """The name as it is, where there is such a file, else that of the project's own file in one of its folders."""
    places = (Path(__file__).resolve().parents[2] / folder / name for folder in folders)
    ours = next((str(place) for place in places if place.is_file()), None)
    return name if ours is None or Path(name).expanduser().exists() else ours


def _checked(path: Path, key: str, value: Any) -> Any:
    """A recipe's value, if it is of the kind that its option takes."""
    if key in _LISTS:
        value = [value] if isinstance(value, str) else value
        fits, wanted = isinstance(value, list) and all(isinstance(each, str) for each in value), "a list of names"
    elif key in _NUMBERS:
        fits, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif key == "packed":
        fits, wanted = isinstance(value, bool), "true or false"
    elif key == "dtype":
        fits, wanted = value in DTYPES, " or ".join(DTYPES)
    else:
        fits, wanted = isinstance(value, str), "a text"
    if not fits:
        raise UserError(f"--config {path}: {key} must be {wanted}, not {value!r}")
    return value
