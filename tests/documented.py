"""The `train` and `quantize` commands in README, docs, configs and data notes, and how tests run one.

Words in capitals (RUN, SCHEME) stand for something of the reader's: such commands are left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"^(?:#\s*|\$ )?((?:train|quantize) .*?)(?:\s{2,}#.*|\s+#\s.*)?$")
SMALL = re.compile(r"tiny\.yaml|--model\.random=tiny")
LARGE = "--model.random=full"
ARCHITECTURE = "--model.random=tiny"


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


# By what they need, as test processes share them file by file: those on each other's runs, those of a config, the rest.
CHAIN, CONFIGS, REST = list[str](), list[str](), list[str]()
_used = [command for command in DOCUMENTED.values() if command.startswith("quantize ")]
for _place, _command in DOCUMENTED.items():
    _made = re.search(r"--run\.name=(\w+)", _command)
    if _command in _used or (_made and any(re.search(rf"\b{_made[1]}\b", other) for other in _used)):
        CHAIN.append(_place)
    else:
        (REST if ".md:" in _place else CONFIGS).append(_place)


def _placed(word: str, root: Path) -> str:
    """A word of a command, with the documents' runs and the folders that they make among the tests' runs."""
    if word in ("small", "calibrated"):
        return str(root / word)
    return str(root / word.removeprefix("runs/")) if word.startswith("runs/") else word


def check(place: str, runs: Any, folder: Path) -> None:
    """Runs a command, which must succeed.

    One that ends on this machine is run. One that needs the hub, a GPU or its memory is run with `--dry-run`, which
    reads every option and plans the steps; so is a sweep, which is many runs. Of a config's tiny model the metrics are
    looked at, too.
    """
    command, *words = shlex.split(DOCUMENTED[place])
    if command == "quantize":
        words = [_placed(word, runs.root) for word in words]
        here = (
            ["--root", str(runs.root), "--output", str(folder)]
            if words[0] in ("compare", "sensitivity", "eval")
            else []
        )
        done = runs.quantize(*words, *here)
    elif SMALL.search(DOCUMENTED[place]) and LARGE not in words and "--sweep" not in words:
        done = runs.train(*words)
    else:
        done = runs.train(*words, *([] if "--dry-run" in words else ["--dry-run"]))
        assert "steps" in done.stdout
    assert done.returncode == 0, done.stderr[-2000:]
    if command == "train" and ARCHITECTURE in words and "--sweep" not in words:
        metrics = runs.metrics(Path(done.stdout.rpartition("report: ")[2].strip()).parent)
        assert metrics["train_ship_gap"] == 0.0
        assert metrics["coverage"]["quantized_fraction"] == 1.0
        assert abs(metrics["backend_gap"]) < 1e-4
