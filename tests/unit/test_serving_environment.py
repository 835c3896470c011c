"""Where vLLM is found, and how its environment is made; no package is installed here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from fake_vllm import make_environment

from quantize.errors import UserError
from quantize.serving import environment, gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's own is found."""
    (tmp_path / "prefix" / "bin").mkdir(parents=True)
    monkeypatch.delenv("ONGRID_VLLM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "prefix" / "bin" / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))


def test_places_are_looked_at_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_environment(tmp_path / "prefix" / "vllm", vllm="0.1")
    assert environment.find_vllm().version == "0.1"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "vllm").symlink_to(make_environment(tmp_path / "tool", vllm="0.2") / "bin" / "vllm")
    assert environment.find_vllm().version == "0.2"
    (tmp_path / "prefix" / "bin" / "vllm").symlink_to(make_environment(tmp_path / "here", vllm="0.3") / "bin" / "vllm")
    assert environment.find_vllm().version == "0.3"
    monkeypatch.setenv("ONGRID_VLLM", str(make_environment(tmp_path / "named", vllm="0.4")))
    assert environment.find_vllm().version == "0.4"
    found = environment.find_vllm(make_environment(tmp_path / "given", vllm="0.5", further=("mslk-cuda==1.1.0",)))
    assert (found.version, found.torchao, found.packages["mslk-cuda"]) == ("0.5", "0.18.0", "1.1.0")
    assert found.executable == tmp_path / "given" / "bin" / "vllm"


def test_its_own_programs_come_first_and_our_paths_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    variables = environment.find_vllm(make_environment(tmp_path / "given")).environment()
    assert variables["PATH"].split(os.pathsep)[0] == str(tmp_path / "given" / "bin")
    assert "PYTHONPATH" not in variables


def test_none_is_said_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="quantize serve --setup"):
        environment.find_vllm()
    with pytest.raises(UserError, match=r"--env .*gone: .*bin/vllm is not there"):
        environment.find_vllm(tmp_path / "gone")
    monkeypatch.setenv("ONGRID_VLLM", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"\$ONGRID_VLLM"):
        environment.find_vllm()
    half = make_environment(tmp_path / "half")
    (half / "lib" / "python3.12" / "site-packages" / "vllm-0.23.0.dist-info" / "METADATA").unlink()
    with pytest.raises(UserError, match="half an installation"):
        environment.find_vllm(half)


def _python(path: Path, pip: str) -> str:
    """A stand-in for Python 3.12: `-m venv FOLDER` makes a folder whose python runs `pip` for `-m pip`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"\n'
        f'elif [ "$1" = -m ]; then folder=$(dirname $(dirname "$0")); echo "$@" > "$folder/asked"; {pip}; fi\n'
    )
    path.chmod(0o755)
    return str(path)


def test_setup_installs_the_lock_into_an_environment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    python = _python(tmp_path / "python3.12", "true")
    monkeypatch.setattr(environment, "find_python", lambda: python)
    folder = tmp_path / "made"
    environment.install(folder)
    assert (folder / "asked").read_text().split() == [
        "-m", "pip", "install", "--no-deps", "-r", str(environment.LOCK)
    ]  # fmt: skip
    environment.install(folder)  # what it made itself may be replaced
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="was not made by quantize serve --setup"):
        environment.install(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_setup_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    python = _python(tmp_path / "python3.12", "echo 'ERROR: No matching distribution found for vllm' >&2; exit 1")
    monkeypatch.setattr(environment, "find_python", lambda: python)
    with pytest.raises(UserError, match=r"pip could not install .* No matching distribution found for vllm"):
        environment.install(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "made-by-ongrid.txt").write_text("before")
    with pytest.raises(UserError):
        environment.install(tmp_path / "made")
    assert (tmp_path / "made" / "made-by-ongrid.txt").read_text() == "before"  # one that worked works on
    (tmp_path / "made").rename(tmp_path / "made.replaced")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "made-by-ongrid.txt").touch()  # as a killed one leaves it
    with pytest.raises(UserError):
        environment.install(tmp_path / "made")
    assert (tmp_path / "made" / "made-by-ongrid.txt").read_text() == "before"
    assert not (tmp_path / "made.replaced").exists()
    Path(python).write_text("#!/bin/sh\necho 'ensurepip is not available'; exit 1\n")  # on stdout, as venv does
    with pytest.raises(UserError, match=r"could not make an environment in .*: ensurepip is not available"):
        environment.install(tmp_path / "made")


def test_another_python_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 9))
    with pytest.raises(UserError, match=r"for Python 3\.12, this is 3\.11, and no python3\.12 is on PATH"):
        environment.find_python()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "python3.12").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "python3.12").chmod(0o755)
    with pytest.raises(UserError, match=r"python3\.12 cannot make an environment"):
        environment.find_python()
    python = _python(tmp_path / "python3.12", "true")
    assert environment.find_python() == python
    monkeypatch.setattr(sys, "version_info", (3, 12, 3))
    assert environment.find_python() == python  # this one cannot make an environment
    _python(Path(sys.executable), "true")
    assert environment.find_python() == sys.executable
    Path(python).write_text("#!/bin/sh\nexit 1\n")
    Path(sys.executable).write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match=r"bin/python cannot make an environment \(venv\), and .*apt-get"):
        environment.find_python()


@pytest.mark.parametrize(
    "script",
    [
        "#!{python}\nimport vllm\n",
        "#!/usr/bin/env python3\n",
        "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n",
    ],
)
def test_the_interpreter_is_the_one_that_the_script_names(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool's link, and a system's Python whose programs lie elsewhere."""
    folder = make_environment(tmp_path / "env")
    python = folder / "bin" / "python3"
    python.touch(0o755)
    monkeypatch.setenv("PATH", str(python.parent))
    (tmp_path / "local" / "bin").mkdir(parents=True)
    vllm = tmp_path / "local" / "bin" / "vllm"
    vllm.write_text(script.format(python=python))
    vllm.chmod(0o755)
    found = environment.find_vllm(tmp_path / "local")
    assert (found.python, found.version) == (python, "0.23.0")
    assert found.environment()["PATH"].split(os.pathsep)[:2] == [str(python.parent), str(vllm.parent)]


def test_the_driver_must_run_its_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.find_vllm(make_environment(tmp_path / "13", further=("nvidia-cuda-runtime==13.0.96",)))
    gpu.check_driver(found, "580.95.05")
    gpu.check_driver(environment.find_vllm(make_environment(tmp_path / "unknown")), "470.1")
    with pytest.raises(UserError, match=r"driver is 575\.57, and .* CUDA 13, which needs 580 or newer"):
        gpu.check_driver(found, "575.57")
    monkeypatch.setenv("VLLM_ENABLE_CUDA_COMPATIBILITY", "1")
    gpu.check_driver(found, "575.57")
    assert environment.lock_pins()["nvidia-cuda-runtime"].startswith("13.")


def test_the_lock_is_one() -> None:
    assert environment.LOCK.read_text() == (ROOT / "requirements" / "vllm.txt").read_text()
    pins = environment.lock_pins()
    wanted = {
        "vllm": "0.23.0",
        "torchao": "0.18.0",
        "torch": "2.11.0",
        "torchvision": "0.26.0",
        "transformers": "5.17.0",
    }
    assert {name: pins[name] for name in wanted} == wanted
