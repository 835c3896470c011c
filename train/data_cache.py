"""Tokenised data that the runs of one folder share: what an earlier run prepared from the same files is copied.

A copy is found under a fingerprint of everything that decides it: the contents of the data files (not their names),
the tokenizer, the chat template's text, the `data` section, the length, the seed, the libraries, and our code.
Data of the hub is prepared anew by each run: what its name stands for may change, and no revision of it is named.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import UserError
from train.data import local_file, template_text
from train.stage_log import file_fingerprint, fingerprint_of

if TYPE_CHECKING:
    from train.config import RunConfig

_LIBRARIES = ("datasets", "jinja2", "tokenizers", "transformers")
_TOKENIZER = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt", ".vocab"}
"""Endings of the files beside the weights; the index of the weights among them does no harm."""


def data_key(config: RunConfig, model: Path) -> str | None:
    """What decides the tokenised data of a run.

    Args:
        model: the folder with the tokenizer.

    Returns:
        A fingerprint, None where a source is not a file of this machine.
    """
    contents: list[list[str]] = []
    for name in (config.data.train, config.data.eval):
        try:
            path = None if name is None else local_file(name)
        except UserError:
            return None  # no such file: `prepare_data` says so
        if name is not None and path is None:
            return None
        contents.append([] if path is None else [path.suffix, file_fingerprint(path)])
    tokenizer = {file.name: file_fingerprint(file) for file in sorted(model.iterdir()) if file.suffix in _TOKENIZER}
    code = {file.name: file_fingerprint(file) for file in sorted(Path(__file__).parent.glob("data*.py"))}
    settings = config.data.model_dump(mode="json", exclude={"train", "eval", "chat_template"})
    template = template_text(config.data.chat_template)
    asked = [config.train.method, config.train.max_length, config.run.seed]
    whole = [contents, tokenizer, code, settings, template, asked]
    return fingerprint_of(whole, [_version(name) for name in _LIBRARIES])


def shared(
    folder: Path, files: Sequence[str], cache: Path, key: Callable[[], str | None], make: Callable[[], None]
) -> bool:
    """Fills a run's data folder from the cache, else by `make`, whose result is then kept.

    Args:
        folder: the run's own; replaced.
        files: what `make` leaves there.
        cache: the folder of all copies.
        key: `data_key`; asked again after `make`, so that files that change meanwhile leave no wrong copy.

    Returns:
        Whether it came from the cache.
    """
    found = key()
    kept = None if found is None else cache / found
    if kept is not None and all((kept / name).is_file() for name in files):
        shutil.rmtree(folder, ignore_errors=True)
        _copy(kept, folder)
        return True
    make()
    if kept is not None and key() == found:
        shutil.rmtree(kept, ignore_errors=True)  # of a copy some files of which were deleted
        with contextlib.suppress(OSError):  # another process was first, or the disk is full: this run has its data
            _copy(folder, kept)
    return False


def _copy(source: Path, target: Path) -> None:
    """Copies a folder to where none is, so that it appears whole; of several processes the first one does."""
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
