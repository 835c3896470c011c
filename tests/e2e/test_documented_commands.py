"""Every `train` and `quantize` command in README, docs, configs and data notes does what it says.

Commands that end on this machine are run. Those that need the hub, a GPU or its memory are run with `--dry-run`, which
reads every option and plans the steps. Words in capitals (RUN, SCHEME) stand for something of the reader's: left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"^(?:#\s*|\$ )?((?:train|quantize) .*?)(?:\s{2,}#.*|\s+#\s.*)?$")
SMALL = re.compile(r"tiny\.yaml|--model\.random=tiny")
LARGE = "--model.random=full"


def _documented() -> Iterator[tuple[str, str]]:
    """(file:line, command), with continued lines joined."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("configs/*.yaml")]
    files += ROOT.glob("examples/tasks/*.yaml")
    for file in files:
        fenced = file.suffix != ".md"
        lines = iter(enumerate(file.read_text(encoding="utf-8").splitlines(), 1))
        for number, line in lines:
            if line.startswith("```"):
                fenced = not fenced
            while line.rstrip().endswith("\\"):
                line = line.rstrip()[:-1] + next(lines)[1].lstrip("# ")
            found = COMMAND.match(line)
            if fenced and found and not re.search(r"\b[A-Z]{3,}\b", found[1]):
                yield f"{file.relative_to(ROOT)}:{number}", found[1].strip()


DOCUMENTED = dict(_documented())


def test_the_documents_hold_commands() -> None:
    assert any(place.startswith("README") for place in DOCUMENTED)
    assert {place.partition(":")[0] for place in DOCUMENTED} >= {
        f"configs/{p.name}" for p in ROOT.glob("configs/*.yaml")
    }


def _placed(word: str, root: Path) -> str:
    """A word of a command, with the documents' runs and the folders that they make among the tests' runs."""
    if word in ("small", "calibrated"):
        return str(root / word)
    return str(root / word.removeprefix("runs/")) if word.startswith("runs/") else word


@pytest.mark.slow
@pytest.mark.parametrize("place", DOCUMENTED)
def test_a_documented_command_works(place: str, runs: Any, tmp_path: Path) -> None:
    command, *words = shlex.split(DOCUMENTED[place])
    if command == "quantize":
        words = [_placed(word, runs.root) for word in words]
        here = (
            ["--root", str(runs.root), "--output", str(tmp_path)]
            if words[0] in ("compare", "sensitivity", "eval")
            else []
        )
        done = runs.quantize(*words, *here)
    elif SMALL.search(DOCUMENTED[place]) and LARGE not in words:
        done = runs.train(*words)
    else:
        done = runs.train(*words, *([] if "--dry-run" in words else ["--dry-run"]))
        assert "steps" in done.stdout
    assert done.returncode == 0, done.stderr[-2000:]
