"""The kernels compile for the GPUs that they are for: the interpreter runs neither the compiler nor all branches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="make test-kernels brings it")


@pytest.mark.parametrize(("capability", "kernels"), [(80, 64), (89, 93), (90, 93)])
def test_every_kernel_compiles(capability: int, kernels: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_all.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= kernels
