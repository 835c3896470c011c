"""Documented commands that are about the runs of one another, in the documents' order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from documented import ARCHITECTURE, CHAIN, DOCUMENTED, ROOT, check


def test_the_documents_hold_commands() -> None:
    assert any(place.startswith("README") for place in DOCUMENTED)
    assert {place.partition(":")[0] for place in DOCUMENTED} >= {
        f"configs/{p.name}" for p in ROOT.glob("configs/*.yaml")
    }
    assert {place.partition(":")[0] for place, command in DOCUMENTED.items() if ARCHITECTURE in command} >= {
        f"configs/{p.name}" for p in ROOT.glob("configs/sft_*.yaml")
    }


@pytest.mark.slow
@pytest.mark.parametrize("place", CHAIN)
def test_a_documented_command_works(place: str, runs: Any, tmp_path: Path) -> None:
    check(place, runs, tmp_path)
