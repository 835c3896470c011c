"""The commands that the configs and the example tasks name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from documented import CONFIGS, check


@pytest.mark.slow
@pytest.mark.parametrize("place", CONFIGS)
def test_the_command_of_a_config_works(place: str, runs: Any, tmp_path: Path) -> None:
    check(place, runs, tmp_path)
