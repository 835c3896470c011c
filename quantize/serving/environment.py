"""vLLM's environment: where it is found, what it holds, and the exact packages that make one.

vLLM brings a torch of its own, so it never shares an environment with training. Only its executable is called.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from quantize.errors import UserError

LOCK = Path(__file__).with_name("vllm.txt")
"""The exact packages, those of requirements/vllm.txt; here, as a wheel holds no folder of requirements."""
COMMAND = "quantize serve --setup"
VARIABLE = "ONGRID_VLLM"
_PYTHON = (3, 12)
_MADE = "made-by-ongrid.txt"
_DRIVERS = {"12": 525, "13": 580}
"""The oldest driver of NVIDIA that runs programs of a CUDA version."""
_SHEBANG = re.compile(r"""^#![ ]*(?P<env>/\S*/env[ ]+(?:-S[ ]+)?)?(?P<python>\S*python[\d.]*)(?:[ ].*)?$""")
_TRAMPOLINE = re.compile(r"""^\'\'\'exec\'[ ]["\']?(?P<python>/[^"\']*?python[\d.]*)["\']?[ ]"\$0\"""")
"""How pip names an interpreter whose path is too long for a first line, or holds a blank: `#!/bin/sh`, then this."""


@dataclass(frozen=True)
class Vllm:
    """An installed vLLM.

    Attributes:
        executable: the command `vllm`. version: as "0.23.0". python: the interpreter that runs it.
        site: the folder of its packages.
        packages: version of each package in it, by its name with dashes.
        found: how it was found, in words.
    """

    executable: Path
    version: str
    site: Path
    packages: Mapping[str, str]
    found: str
    python: Path

    @property
    def torchao(self) -> str | None:
        """The version of torchao beside it; None = there is none, and it loads no quantised folder of ours."""
        return self.packages.get("torchao")

    @property
    def cuda(self) -> str | None:
        """The major version of CUDA that its torch is built for, as "13"; None = not known."""
        found = self.packages.get("nvidia-cuda-runtime")
        if found is not None:
            return found.partition(".")[0]
        return "12" if "nvidia-cuda-runtime-cu12" in self.packages else None

    @property
    def driver(self) -> int | None:
        """The oldest major version of NVIDIA's driver that runs it; None = not known."""
        return _DRIVERS.get(self.cuda or "")

    def environment(self) -> dict[str, str]:
        """The variables it is started with: its own programs first on PATH (ninja builds kernels), no paths of ours,
        GPUs numbered as nvidia-smi does."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        own = dict.fromkeys(map(str, (self.python.parent, self.executable.parent, self.executable.resolve().parent)))
        path = os.pathsep.join([*own, os.environ.get("PATH", os.defpath)])
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | kept | {"PATH": path}


def lock_pins() -> dict[str, str]:
    """Version of each package of the lock, by name."""
    lines = LOCK.read_text(encoding="utf-8").split()
    return dict(line.split("==", 1) for line in lines)


def made_folder() -> Path:
    """Where `install` puts it by default: a folder of this Python's own environment, so that it goes when that goes."""
    return Path(sys.prefix) / "vllm"


def find_vllm(folder: Path | None = None) -> Vllm:
    """The vLLM to use: of that environment, else $ONGRID_VLLM, beside this Python, on PATH, or made by `install`.

    Args:
        folder: an environment, as `python -m venv` makes it.

    Raises:
        UserError: there is none, or what is there is none; with the command that installs it.
    """
    if folder is not None:
        return _read(folder.expanduser() / "bin" / "vllm", f"--env {folder}")
    named = os.environ.get(VARIABLE)
    if named:
        return _read(Path(named).expanduser() / "bin" / "vllm", f"${VARIABLE}")
    here = Path(sys.executable).parent / "vllm"  # not resolved: a venv's python links to the system's
    if here.is_file():
        return _read(here, "beside this Python")
    on_path = shutil.which("vllm")
    if on_path is not None:
        return _read(Path(on_path), "on PATH")
    made = made_folder() / "bin" / "vllm"
    if made.is_file():
        return _read(made, f"made by {COMMAND}")
    raise UserError(
        f"vLLM is not installed: not in this Python's environment, on PATH or in {made_folder()}; it brings a torch of "
        f"its own, so it gets an environment of its own: {COMMAND} makes one, --env FOLDER or ${VARIABLE} names one"
    )


def _read(executable: Path, found: str) -> Vllm:
    if not executable.is_file():
        raise UserError(
            f"{found}: {executable} is not there; name an environment that holds vLLM, or make one with: {COMMAND}"
        )
    if not os.access(executable, os.X_OK):
        raise UserError(f"{found}: {executable} cannot be run; make a new environment with: {COMMAND}")
    python = _interpreter(executable)
    prefixes = [python.parent.parent, executable.resolve().parent.parent]  # a system's Python installs beside itself
    for site in (site for prefix in prefixes for site in sorted(prefix.glob("lib*/python3*/*-packages"))):
        packages = {
            name.lower().replace("_", "-"): each.version
            for each in metadata.distributions(path=[str(site)])
            if (name := each.metadata["Name"]) is not None
        }
        if "vllm" in packages:
            return Vllm(executable, packages["vllm"], site, packages, found, python)
    raise UserError(
        f"{found}: {executable} is there, but {' and '.join(dict.fromkeys(map(str, prefixes)))} holds no package vllm: "
        f"half an installation? Make a new one with: {COMMAND}"
    )


def _interpreter(executable: Path) -> Path:
    """The Python that a script names at its beginning; where it names none, the one beside it."""
    with executable.open("rb") as stream:
        first, second, *_ = [*stream.read(4096).decode(errors="replace").splitlines(), "", ""]
    named = _SHEBANG.match(first) or (_TRAMPOLINE.match(second) if first.startswith("#!/bin/sh") else None)
    if named is not None:
        asked = named["python"]
        found = shutil.which(asked) if "env" in named.groupdict() and named["env"] else asked
        if found is not None and Path(found).is_file():
            return Path(found)
    return executable.resolve().parent / "python"


# ---------------------------------------------------------------------- installation


def find_python() -> str:
    """A Python of the version that the lock is for: this one, else the one on PATH. Raises UserError for none."""
    if sys.version_info[:2] == _PYTHON and _makes_environments(sys.executable):
        return sys.executable
    name = ".".join(map(str, _PYTHON))
    found = shutil.which(f"python{name}")
    if found is not None and _makes_environments(found):
        return found
    lacking = f"no python{name} is on PATH" if found is None else f"{found} cannot make an environment (venv)"
    here = ".".join(map(str, sys.version_info[:2]))
    this = f"this is {here}" if here != name else f"{sys.executable} cannot make an environment (venv)"
    raise UserError(
        f"vLLM's exact packages are for Python {name}, {this}, and {lacking}; "
        f"install one (Debian, Ubuntu: apt-get install python{name} python{name}-venv)"
    )


def _makes_environments(python: str) -> bool:
    """Debian splits venv off, and a version manager's stand-in for a Python may lead nowhere."""
    try:
        return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    except OSError:
        return False


def install(folder: Path) -> None:
    """Makes an environment with the exact packages of `LOCK` in `folder`, some 10 GB; what an earlier `install` made
    there is replaced, and comes back where this one fails.

    Raises:
        UserError: no Python fits, the folder is another's or cannot be written, or pip cannot install them.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and not (folder / _MADE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and was not made by {COMMAND}; name another: {COMMAND} --env FOLDER")
    python = find_python()
    parent = next(each for each in folder.parents if each.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written; name another folder: {COMMAND} --env FOLDER")
    # Made in its place, as the scripts of an environment hold its path; what was there waits beside it.
    old = folder.with_name(f"{folder.name}.replaced")
    _bring_back(old, folder)
    if folder.exists():
        folder.rename(old)
    try:
        folder.mkdir(parents=True)
        (folder / _MADE).touch()  # ours, and empty until it is whole
        _call([python, "-m", "venv", str(folder)], f"{python} could not make an environment in {folder}")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-deps", "-r", str(LOCK)]
        _call(pip, f"pip could not install the {len(lock_pins())} packages of {LOCK}")
        (folder / _MADE).write_text(LOCK.read_text(encoding="utf-8"), encoding="utf-8")
    finally:
        _bring_back(old, folder)


def _bring_back(old: Path, folder: Path) -> None:
    """After an installation that ended, or was killed: removes half an environment, and what it replaced comes back."""
    mark = folder / _MADE
    if mark.is_file() and mark.stat().st_size == 0:
        shutil.rmtree(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _call(command: list[str], failed: str) -> None:
    """Runs it with its output shown, as it takes minutes; the last line of its complaints ends the error.

    Both of its streams go to stderr: venv complains on stdout.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment["PYTHONUNBUFFERED"] = "1"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    last = error = ""
    try:
        for line in process.stdout:
            sys.stderr.write(line)
            last = line.strip() or last
            error = last if last.startswith("ERROR") else error  # pip speaks of its own next version after it
        if process.wait():
            raise UserError(f"{failed}: {error or last or 'no message'}")
    finally:
        process.kill()
        process.wait()
