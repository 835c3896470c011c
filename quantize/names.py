"""Names of modules, and which of them a user keeps in 16 bit. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def is_kept(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's name, its last part, or the name of a module above it fits a pattern of `fnmatch`.

    So "down_proj" is every block's, "model.layers.0" is all of the first block, and so is "*.layers.0.*"; "experts" are
    both matrices of every block's fused experts.
    """
    parts = name.split(".")
    names = [
        parts[-1],
        *(["experts"] if parts[-2:-1] == ["experts"] else []),
        *(".".join(parts[:length]) for length in range(1, len(parts) + 1)),
    ]
    return any(fnmatchcase(each, pattern) for pattern in patterns for each in names)
