"""Documented commands that need no other's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from documented import REST, check


@pytest.mark.slow
@pytest.mark.parametrize("place", REST)
def test_a_documented_command_works_by_itself(place: str, runs: Any, tmp_path: Path) -> None:
    check(place, runs, tmp_path)
