"""`ongrid.json`, beside config.json: how a quantised folder was made, for its card and for `quantize eval`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "ongrid.json"
_PACKAGES = ("ongrid", "torch", "torchao", "transformers")


def write_record(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes the record of a folder.

    Args:
        about: source (folder or hub id), revision, scheme, target, group_size, skip, dtype, algorithms, calibration
            {data, samples, tokens, left_out}, notes (what the algorithms did), trained (its numbers are those of a
            training), coverage (`quantize.layers.Coverage.as_dict`), license; what is not known is None or left out.
            Versions and device are added.
    """
    from quantize.hardware import describe_device, installed

    versions = {"python": platform.python_version(), **installed(_PACKAGES)}
    text = json.dumps({**about, "versions": versions, "device": describe_device()}, indent=1)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder; empty where there is none. Raises UserError where it cannot be read."""
    from quantize.files import read_mapping

    path = folder / RECORD
    return read_mapping(path) if path.is_file() else {}
