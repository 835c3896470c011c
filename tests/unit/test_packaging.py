"""The files around the code: locks, container, licence, what a wheel holds, and who may import whom."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
NOT_OURS = {".git", ".venv", "runs", "wandb", "build", "dist", "unsloth_compiled_cache"}


def load_check() -> ModuleType:
    """requirements/check.py as a module; its folder is no package."""
    spec = importlib.util.spec_from_file_location("lock_check", ROOT / "requirements" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load_check()


def our_files() -> list[Path]:
    """The files of this checkout that git knows or would add; without git, all but outputs and environments."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        files = [ROOT / name for name in listed.split("\0") if name]
    else:
        files = [path for path in ROOT.rglob("*") if not NOT_OURS & set(path.relative_to(ROOT).parts)]
    return [path for path in files if path.is_file()]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# ---- locks -----------------------------------------------------------------------------------------------------------


def test_the_locks_exist() -> None:
    assert LOCKS == [check.CPU_LOCK, check.CUDA_LOCK, check.VLLM_LOCK]


def test_the_package_ships_the_lock_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check.check_shipped() == []
    other = ROOT / "requirements" / "cpu-py311.txt"
    monkeypatch.setattr(check, "SHIPPED", other)
    assert "not the same list" in check.check_shipped()[0]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_lock_holds_sorted_exact_versions_that_fit_pyproject(lock: Path) -> None:
    assert check.check_form(lock) == []


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the CPU lock is for Python 3.11")
def test_cpu_lock_is_complete() -> None:
    assert check.check_closure(check.CPU_LOCK) == []


def test_cpu_lock_has_no_gpu_packages() -> None:
    pins, _ = check.parse_lock(check.CPU_LOCK)
    assert [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton", "torchvision", "xformers"))] == []


def test_cuda_lock_is_the_set_that_was_measured_on_a_gpu() -> None:
    pins, _ = check.parse_lock(check.CUDA_LOCK)
    measured = {"torch": "2.11.0", "torchvision": "0.26.0", "torchao": "0.18.0", "transformers": "5.17.0"}
    measured |= {"peft": "0.21.2", "trl": "1.15.0", "datasets": "4.8.5"}
    assert {name: pins[name] for name in measured} == measured
    assert "triton" in pins


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rich>=15\n", "not `name==version`"),
        ("torch==2.13.0+cpu\n", "not `name==version`"),
        ("unsloth @ file:unsloth.whl\n", "not `name==version`"),
        ("# a comment\n", "not `name==version`"),
        ("rich==15.0.0\nRich==15.0.0\n", "listed twice"),
        ("tqdm==4.70.1\nrich==15.0.0\n", "not sorted"),
    ],
)
def test_faults_of_form_are_named(tmp_path: Path, text: str, fault: str) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(text, encoding="utf-8")
    _, faults = check.parse_lock(lock)
    assert len(faults) == 1
    assert fault in faults[0]


def test_a_missing_dependency_is_found(tmp_path: Path) -> None:
    lines = check.CPU_LOCK.read_text(encoding="utf-8").splitlines(keepends=True)
    shorter = tmp_path / check.CPU_LOCK.name
    shorter.write_text("".join(line for line in lines if not line.startswith("urllib3==")), encoding="utf-8")
    pins, _ = check.parse_lock(shorter)
    asked = [("requests", need) for need in check.needs("requests")]
    assert any("urllib3" in fault for fault in check.check_ranges(shorter, pins, asked))


# ---- what lies around ------------------------------------------------------------------------------------------------


def test_no_registry_or_machine_in_any_file() -> None:
    """A clone must work with whatever index and folders its owner has."""
    hosts = ["files.python" + "hosted", "py" + "pi.org", "download." + "pytorch", "registry." + "npmjs"]
    folders = ["/" + name + "/" for name in ("root", "work", "opt/wheels", "opt/pypi")]
    forbidden = re.compile("|".join(map(re.escape, hosts + folders)))
    found = []
    for path in our_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in forbidden.finditer(text)]
    assert found == []


def test_nothing_that_installs_names_an_address() -> None:
    for name in ["Makefile", "Dockerfile", "pyproject.toml", ".ci/run", ".pre-commit-config.yaml", *map(str, LOCKS)]:
        assert "://" not in (ROOT / name).read_text(encoding="utf-8"), name


def test_licence_is_apache_and_complete() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "Apache-2.0"


def test_version_is_one() -> None:
    from importlib import metadata

    version = project()["version"]
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    assert metadata.version("ongrid") == version, "run `make setup` again"


def test_dockerfile_basics() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages: dict[str, list[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("FROM "):
            image, _, name = line.removeprefix("FROM ").partition(" AS ")
            assert name, f"unnamed stage: {line}"
            assert image in stages or re.search(r":[\w.-]*\d", image), f"unpinned image: {image}"
            stages[name] = []
        elif stages and line and not line.startswith("#"):
            stages[name].append(line)
    for target, lock in (("cuda", "cuda-py312.txt"), ("cpu", "cpu-py311.txt")):
        packages = "\n".join(stages[f"{target}-packages"])
        assert f"COPY requirements/{lock}" in packages
        assert "type=cache" in packages
        assert "--no-deps" in packages
        assert "USER 10001" in stages[target]
        assert any(line.startswith("ENTRYPOINT [") for line in stages[target])
    assert "ADD " not in text
    assert ":latest" not in text
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    assert {f"!{name}" for name in ("train", "qat", "quantize", "configs", "examples", "pyproject.toml")} <= set(
        ignored
    )


def test_ci_and_hooks_are_there() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}


# ---- imports ---------------------------------------------------------------------------------------------------------


def imported_packages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level package of each absolute import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]


@pytest.mark.parametrize(("package", "above"), [("qat", {"train"}), ("quantize", {"train", "qat"})])
def test_imports_go_down_only(package: str, above: set[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, name in imported_packages(path)
        if name in above
    ]
    assert found == []


# ---- what an install holds -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked. Built from a copy, so that no build folder is left behind here."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in our_files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "--wheel-dir", source / "dist", source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = (source / "dist").glob("ongrid-*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_wheel_holds_our_packages_and_nothing_else(site: Path) -> None:
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"train", "qat", "quantize", "configs", "examples"}
    assert sorted(path.name for path in (site / "examples").iterdir()) == ["data", "tasks"]
    assert list(site.rglob("__pycache__")) == []


def test_wheel_holds_every_module_config_template_and_row(site: Path) -> None:
    wanted = {
        path.relative_to(ROOT)
        for folder in ("train", "qat", "quantize", "configs", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".yaml", ".jinja", ".jsonl", ".md", ".typed"}
    }
    assert sorted(str(path) for path in wanted if not (site / path).is_file()) == []


def test_shipped_configs_find_their_data_in_a_wheel(site: Path) -> None:
    named = 0
    for path in sorted((site / "configs").rglob("*.yaml")):
        data = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data") or {}
        for source in (data.get("train"), data.get("eval")):
            if isinstance(source, str) and source.startswith("examples/"):
                named += 1
                assert (site / source).is_file(), f"{path.name} names {source}"
    assert named, "quickstart.yaml names its data"


def test_console_commands_exist(site: Path) -> None:
    (entries,) = site.glob("ongrid-*.dist-info/entry_points.txt")
    text = entries.read_text(encoding="utf-8")
    assert "train = train.cli:main" in text
    assert "quantize = quantize.cli:main" in text
    for package in ("train", "quantize"):
        assert "def main(" in (site / package / "cli.py").read_text(encoding="utf-8")
