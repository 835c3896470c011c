"""Which variables a process that measures gets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantize import surroundings, worker


@pytest.fixture(autouse=True)
def _as_at_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(surroundings, "_set", {})
    for name in ("OF_USER", "OF_LIBRARY", "OF_BOTH"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_what_libraries_set_in_a_run_reaches_none_of_its_processes_nor_those_of_the_next_run() -> None:
    os.environ |= {"OF_USER": "1", "OF_BOTH": "user"}
    with surroundings.kept():
        os.environ |= {"OF_LIBRARY": "1", "OF_BOTH": "library"}
        found = surroundings.variables()
        assert (found.get("OF_USER"), found.get("OF_LIBRARY"), found["OF_BOTH"]) == ("1", None, "user")
    for _ in range(2):  # libraries set theirs once, when they are imported
        assert surroundings.variables() == found
        with surroundings.kept():
            assert surroundings.variables() == found


def test_what_the_user_sets_between_two_runs_counts() -> None:
    with surroundings.kept():
        os.environ |= {"OF_LIBRARY": "1", "OF_BOTH": "library"}
    os.environ |= {"OF_USER": "2", "OF_BOTH": "user"}
    with surroundings.kept():
        found = surroundings.variables()
    assert (found["OF_USER"], found["OF_BOTH"], found.get("OF_LIBRARY")) == ("2", "user", None)


def test_what_a_library_takes_away_is_there_for_what_measures() -> None:
    os.environ["OF_USER"] = "1"
    with surroundings.kept():
        del os.environ["OF_USER"]
        assert surroundings.variables()["OF_USER"] == "1"
    assert surroundings.variables()["OF_USER"] == "1"


def test_jobs_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(command: object, environment: dict[str, str], log: Path) -> Iterator[str]:
        (tmp_path / "request.answer.json").write_text(json.dumps([environment.get("OF_LIBRARY")]))
        yield f"{worker.ENDED}0"

    monkeypatch.setattr(worker, "_fresh_lines", lines)
    with surroundings.kept():
        os.environ["OF_LIBRARY"] = "1"
        assert worker.run_jobs([], tmp_path / "request.json") == [None]
    os.environ["OF_LIBRARY"] = "2"
    assert worker.run_jobs([], tmp_path / "request.json") == ["2"]
