"""The packages of ExecuTorch, in a folder of their own inside this Python's environment.

They are not dependencies of the project: the wheel of executorch asks for coremltools, scikit-learn and others that
lowering to XNNPACK never imports, and everything else that it needs (torch, torchao, transformers) is here already, in
the versions that trained. So the folder holds three packages, installed without their dependencies, and only the
process that exports sees it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from quantize.errors import UserError

PACKAGES = ("executorch==1.5.1", "flatbuffers==25.12.19", "ruamel.yaml==0.19.1")
"""What is installed; exact, as the numbers of a kernel belong to its version."""
COMMAND = "quantize export --setup"
_LISTED = "packages.txt"
_IMPORT = "import executorch.extension.llm.custom_ops.custom_ops, executorch.runtime, executorch.exir"


def packages_folder() -> Path:
    """Where the packages lie: a folder of this Python's own environment, so that it goes when that goes."""
    return Path(sys.prefix) / "executorch"


def find_packages(folder: Path) -> Path:
    """The folder, where it holds `PACKAGES`. Raises UserError with the one command that makes it."""
    listed = folder / _LISTED
    if not listed.is_file():
        raise UserError(f"ExecuTorch is not installed ({folder} holds no packages); install it with: {COMMAND}")
    found = listed.read_text(encoding="utf-8").split()
    if found != list(PACKAGES):
        raise UserError(f"{folder} holds {', '.join(found)}, not {', '.join(PACKAGES)}; renew it with: {COMMAND}")
    return folder


def install_packages(folder: Path) -> None:
    """Installs `PACKAGES` into `folder` with pip; what was there is replaced when all of it is on disk.

    Raises:
        UserError: the folder cannot be written, pip cannot install them, or they do not load beside this torch.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    if not os.access(folder.parent, os.W_OK):
        raise UserError(f"{folder.parent} cannot be written; name another folder: {COMMAND} --packages FOLDER")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:", "--target", str(partial)]
    try:
        done = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(f"pip could not install {', '.join(PACKAGES)}: {said}")
        _check_import(partial)
        (partial / _LISTED).write_text("\n".join(PACKAGES) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_import(folder: Path) -> None:
    """Raises UserError where the packages' libraries do not load: their binaries belong to some versions of torch."""
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{PACKAGES[0]} is of no use beside torch {version('torch')} of this Python: {said}")
