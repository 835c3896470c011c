"""One folder of runs for all tests of the line, so that models and baselines are made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TINY = ("--config", "tiny.yaml", "--qat", "int8-int4", "--eval.cost-batches=[]")

# Before any library of the hub is imported: some tests run the line in this process.
os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class Runs:
    """Starts `train` as a user does, in processes of their own, on the folder `root`; `ready` is for `here` alone."""

    root: Path
    ready: Any = None

    def train(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Runs to the end."""
        command = self._command("train", f"--run.root={self.root}", *options)
        return subprocess.run(command, capture_output=True, text=True, env=self._environment(), timeout=400)

    def finish(self, *options: str) -> Path:
        """Runs to the end, which must be a good one, and returns the run directory (`--run.name` is given)."""
        done = self.train(*options)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        name = next(word.partition("=")[2] for word in options if word.startswith("--run.name="))
        return self.root / name

    def here(self, *options: str) -> Path:
        """Runs `tiny.yaml` to the end in this process, where torch is imported already; with peft, as unsloth patches.

        For runs that others are compared with: what the command line and unsloth do is not looked at.
        """
        from train.config_loading import load_config
        from train.pipeline import run

        settings = ["--model.backend=peft", f"--run.root={self.root}", *options]
        return run(load_config("tiny.yaml", settings), sinks=[], ready=self.ready).path

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Starts and returns at once; the process leads a group of its own."""
        return subprocess.Popen(
            self._command("train", f"--run.root={self.root}", *options),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment(), start_new_session=True,
        )  # fmt: skip

    def quantize(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Runs `quantize` to the end."""
        command = self._command("quantize", *options)
        return subprocess.run(command, capture_output=True, text=True, env=self._environment(), timeout=400)

    @staticmethod
    def metrics(run: Path) -> dict[str, Any]:
        """metrics.json."""
        return json.loads((run / "metrics.json").read_text())  # type: ignore[no-any-return]

    @staticmethod
    def _command(module: str, *options: str) -> list[str]:
        return [sys.executable, "-m", module, *options]

    @staticmethod
    def _environment() -> dict[str, str]:
        project = str(Path(__file__).resolve().parents[2])
        return {
            **os.environ,
            "PYTHONPATH": project,
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
        }


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All runs of the tests; those of this process share what forks their measuring processes."""
    from quantize.ready import ReadyProcess

    with ReadyProcess() as ready:
        yield Runs(tmp_path_factory.mktemp("runs"), ready)


@pytest.fixture(scope="session")
def finished(runs: Runs) -> Path:
    """An unbroken int8-int4 run of unsloth on the tiny model."""
    return runs.finish(*TINY, "--run.name=whole")
