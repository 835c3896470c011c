"""Names of modules, and which of them a user keeps in 16 bit. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)
"""Layers of vLLM that are several of transformers': they are quantised together, or none of them."""


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


def fused_names(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Where names have all parts of a layer that vLLM fuses: its name -> theirs, `a.qkv_proj` -> `(a.q_proj, ...)`."""
    known = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        above, _, leaf = name.rpartition(".")
        for fused, parts in FUSED.items():
            members = tuple(f"{above}.{part}" for part in parts)
            if leaf == parts[0] and known.issuperset(members):
                found[f"{above}.{fused}"] = members
    return found
