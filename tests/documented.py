"""The `train` and `quantize` commands in README, docs, configs and data notes, and how tests run one.

Words in capitals (RUN, SCHEME) stand for something of the reader's: such commands are left out, and so are those of
`NOT_RUN`; tests/unit/test_docs.py reads the options of all. A command that stands in several places is run once.
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
CAPITALS = re.compile(r"\b[A-Z]{3,}\b")
NOT_RUN = {
    "quantize export --setup": "takes packages from an index; tests/e2e/test_executorch.py is about what it installs",
    "quantize serve --setup": "takes packages from an index; tests/unit/test_serving_environment.py is about it",
}
"""Commands that no test runs -> the reason."""


def documents() -> list[Path]:
    """What is written for readers; docs/quickstart is a run's own report."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(page for page in pages if page.parent.name != "quickstart")]


def joined_lines(file: Path) -> Iterator[tuple[int, str, str | None]]:
    """(number, line, language of the fence that it is in or None), with continued lines joined."""
    fence: str | None = None if file.suffix == ".md" else "yaml"
    lines = iter(enumerate(file.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if line.startswith("```"):
            fence = line.removeprefix("```").strip() if fence is None else None
            continue
        while line.rstrip().endswith("\\"):
            line = line.rstrip()[:-1] + next(lines)[1].lstrip("# ")
        yield number, line, fence


def same(command: str) -> tuple[str, ...]:
    """Equal for two ways to write a command: dashes and underscores of options are alike."""
    return tuple(
        "=".join([name.replace("-", "_"), *rest]) if word.startswith("--") else word
        for word in shlex.split(command)
        for name, *rest in [word.split("=", 1)]
    )


def _documented() -> Iterator[tuple[str, str]]:
    """(file:line, command). Of equal commands the config's own is taken, else the first."""
    seen = set[tuple[str, ...]]()
    for file in [*sorted(ROOT.glob("configs/*.yaml")), *documents(), *sorted(ROOT.glob("examples/tasks/*.yaml"))]:
        for number, line, fence in joined_lines(file):
            found = COMMAND.match(line)
            if fence is None or not found or CAPITALS.search(found[1]):
                continue
            command = found[1].strip()
            if command not in NOT_RUN and same(command) not in seen:
                seen.add(same(command))
                yield f"{file.relative_to(ROOT)}:{number}", command


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
