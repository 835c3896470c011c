"""Files that others may read at any moment, and files that may be damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from quantize.errors import UserError


def copy_atomically(source: Path, target: Path) -> None:
    """Copies a file so that a reader sees the old or the new one, never a part; several may copy to one place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds a mapping. Raises UserError with the file that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: it holds no mapping")
    return found
