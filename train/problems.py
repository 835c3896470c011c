"""What a check of the settings finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Settings that do not go together.

    Attributes:
        keys: the dotted keys that are read; where they were given is put behind the text.
        text: what is wrong and what to do.
    """

    keys: tuple[str, ...]
    text: str
