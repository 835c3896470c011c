"""The Dockerfile, parsed, and the build context that .dockerignore leaves. `dockerfile_steps` makes a script of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEREDOC = re.compile(r"<<-?\s*([\"']?)(\w+)\1")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name in capitals, its --flags, the rest of its line, and the heredocs that follow."""

    name: str
    flags: tuple[tuple[str, str], ...]
    rest: str
    line: int
    heredocs: tuple[str, ...] = ()

    def options(self, flag: str) -> list[str]:
        """The values of a flag, which may stand there several times."""
        return [value for name, value in self.flags if name == flag]

    def mounts(self) -> list[dict[str, str]]:
        """RUN's mounts: `{"type": "cache", "target": ...}`; a word without value is "true"."""
        return [
            {name: value or "true" for name, _, value in (part.partition("=") for part in mount.split(","))}
            for mount in self.options("mount")
        ]

    def words(self) -> list[str] | None:
        """The list of the exec form; None in the shell form."""
        try:
            found = json.loads(self.rest)
        except ValueError:
            return None
        return found if isinstance(found, list) and all(isinstance(word, str) for word in found) else None


@dataclass
class Stage:
    """From FROM to FROM."""

    image: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str) -> list[Stage]:
    """The stages in order. Raises ValueError, with the line, for what this file should not hold."""
    stages: list[Stage] = []
    for instruction in instructions(text):
        if instruction.name == "FROM":
            image, _, name = re.sub(r"\s+as\s+", " AS ", instruction.rest, flags=re.IGNORECASE).partition(" AS ")
            stages.append(Stage(image.strip(), name.strip()))
        elif stages:
            stages[-1].instructions.append(instruction)
        else:
            raise ValueError(f"line {instruction.line}: {instruction.name} stands before the first FROM")
    return stages


def instructions(text: str) -> Iterator[Instruction]:
    """Joins continued lines, leaves comments out, and gives each instruction the heredocs that it opens."""
    lines = list(enumerate(text.splitlines(), start=1))
    while lines:
        number, line = lines.pop(0)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        while line.rstrip().endswith("\\"):
            if not lines:
                raise ValueError(f"line {number}: nothing follows the last \\")
            _, more = lines.pop(0)
            if not more.lstrip().startswith("#"):
                line = line.rstrip()[:-1] + " " + more.strip()
        name, _, rest = line.strip().partition(" ")
        name, rest, flags = name.upper(), rest.strip(), []
        while found := re.match(r"--([a-z-]+)(?:=(\S+))?\s+", rest):
            flags.append((found[1], found[2] or ""))
            rest = rest[found.end() :]
        bodies = [_body(end, number, lines) for _, end in HEREDOC.findall(rest)] if name in ("RUN", "COPY") else []
        yield Instruction(name, tuple(flags), rest, number, tuple(bodies))


def _body(end: str, number: int, lines: list[tuple[int, str]]) -> str:
    body: list[str] = []
    while lines:
        _, line = lines.pop(0)
        if line.strip() == end:
            return "".join(f"{each}\n" for each in body)
        body.append(line)
    raise ValueError(f"line {number}: the heredoc {end} has no end")


def chain(stages: list[Stage], target: str) -> list[Stage]:
    """The stages that a target is built from, in the file's order: those below it, and those that it copies from."""
    named = {stage.name: stage for stage in stages}
    if target not in named:
        raise ValueError(f"there is no stage {target}; there are {', '.join(named)}")
    needed, waiting = set[str](), [target]
    while waiting:
        name = waiting.pop()
        if name in named and name not in needed:
            needed.add(name)
            waiting.append(named[name].image)
            waiting += [source for step in named[name].instructions for source in step.options("from")]
    return [stage for stage in stages if stage.name in needed]


# ---- the build context -----------------------------------------------------------------------------------------------


def let_in(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore lets a file, relative to the context, in: the last pattern that fits it decides."""
    decided = True
    for pattern in patterns:
        wanted, pattern = pattern.startswith("!"), pattern.removeprefix("!").strip("/")
        parts = path.split("/")
        starts = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if pattern.startswith("**/"):
            fits = any(fnmatch(part, pattern[3:]) for part in parts)
        else:
            fits = any(len(start.split("/")) == len(pattern.split("/")) and fnmatch(start, pattern) for start in starts)
        if fits:
            decided = wanted
    return decided


def ignore_patterns() -> list[str]:
    """The lines of .dockerignore that say something."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def write_context(folder: Path) -> None:
    """Copies what `docker build` would send from this checkout."""
    patterns = ignore_patterns()
    for path in ROOT.rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith((".git/", ".venv/")) and path.is_file() and let_in(name, patterns):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)
