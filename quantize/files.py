"""Files that others may read at any moment, files that may be damaged, and folders that may not be there to write."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def writing_to(folder: Path, option: str = "--output") -> Iterator[None]:
    """What is written inside lies in `folder`. Raises UserError, with the option that named it, where that fails."""
    try:
        yield
    except OSError as error:
        where = next((each for each in (folder, *folder.parents) if each.exists() and not each.is_dir()), None)
        reason = f"{where} is a file, not a folder" if where else error.strerror or str(error)
        if not where and error.filename and Path(error.filename) != folder:
            reason = f"{error.filename}: {reason}"
        raise UserError(f"{option} {folder} cannot be written ({reason}); name another folder") from error


def make_folder(folder: Path, option: str = "--output", *, named: Path | None = None) -> None:
    """Creates it where it is not there.

    Args:
        named: what the user named, where that is not the folder itself.

    Raises:
        UserError: that fails, or nothing can be written into it.
    """
    with writing_to(named or folder, option):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def refuse_run(folder: Path) -> None:
    """Raises UserError where `--output` is a run: a page of that name would replace the run's own report."""
    if (folder / "manifest.json").exists():
        raise UserError(f"--output {folder} is a run, whose own report would be lost; name another folder")


def is_neither(name: str, root: str, what: str) -> UserError:
    """Says that a name is no run and not `what` either, and where both were looked for."""
    places = dict.fromkeys((Path(name).expanduser(), Path(root).expanduser() / name))
    looked = " and ".join(map(str, places))
    return UserError(f"{name} is neither a run nor {what}: there is none at {looked} (--root)")


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds a mapping. Raises UserError with the file that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: it holds no mapping")
    return found


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The files of a checkpoint's weights: `stem`.safetensors, or those that its index names; none where none are.

    Raises:
        UserError: the index cannot be read, or names a file that is not there.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    named = read_mapping(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index} cannot be read: it has no weight_map")
    files = [folder / name for name in sorted(set(named.values()))]
    gone = [path.name for path in files if not path.is_file()]
    if gone:
        raise UserError(
            f"{folder} lacks {len(gone)} of the {len(files)} files that {index.name} names, the first is {gone[0]}; "
            "copy or download the whole folder"
        )
    return files
