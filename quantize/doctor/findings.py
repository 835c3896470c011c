"""What the doctor says: one finding a line, in sections. A probe that fails is a finding, never an end."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["fact", "yes", "simulated", "no", "broken", "unknown"]
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what it is, in a word or three.
        state: "fact" tells, "yes" works, "simulated" is computed in place of what is missing, "no" does not work here,
            "broken" ought to work and does not, "unknown" could not be found out.
        text: what was found, and why.
        command: one line to copy that mends it; empty where nothing needs mending, or no command can.
    """

    name: str
    state: State
    text: str
    command: str = ""


@dataclass(frozen=True)
class Section:
    """Findings under one heading."""

    title: str
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """For --json, without the name of the user's folder."""
        found = [{key: tilde(value) for key, value in asdict(each).items()} for each in self.findings]
        return {"title": self.title, "findings": found}


def tilde(text: object) -> str:
    """The text with ~ for the user's own folder, as a shell takes it: what is shown may be posted."""
    home = os.path.expanduser("~")  # not Path.home, which fails for a user that this machine does not know
    return str(text) if home in ("/", "~") else re.sub(rf"{re.escape(home)}(?=/|$)", "~", str(text))


def look(name: str, probe: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The probe's findings; where it fails, those that it had until then, and its failure as one more."""
    found: list[Finding] = []
    try:
        found.extend(probe())
    except Exception as error:  # on a machine that nobody has seen yet anything may fail
        found.append(Finding(name, "unknown", f"could not be found out ({type(error).__name__}: {first_line(error)})"))
    return found


def first_line(error: object) -> str:
    """A message's first line that holds something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def python() -> str:
    """This interpreter, as a command line in this folder names it."""
    here = Path(sys.executable)
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found and Path(found).parent == here.parent:  # a script names python3.11, of which both are links
            return name
    with suppress(OSError, ValueError):  # elsewhere, or in a folder that is gone
        return shlex.quote(str(here.relative_to(Path.cwd())))
    return tilde(shlex.quote(str(here)))


def pip(*requirements: str, options: str = "") -> str:
    """The command that installs them into this environment."""
    return " ".join([python(), "-m pip install", *filter(None, [options]), *map(shlex.quote, requirements)])


def lock_of(kind: Literal["cpu", "cuda"]) -> Path | None:
    """The lock of this checkout for a kind of machine; None in an install without one."""
    return next(iter(sorted((PROJECT / "requirements").glob(f"{kind}-py3*.txt"))), None)
