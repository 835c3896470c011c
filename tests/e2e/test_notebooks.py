"""Every notebook of `examples/` from top to bottom, with a tiny random model on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from notebooks import NOTEBOOKS, ROOT, Kernel, code_cells, read, tagged, with_settings

SMALL = {"TINY": "True", "STEPS, BATCH, LENGTH": "3, 2, 128"}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Runs all notebooks, in one folder: the untouched model is measured once. It finds this checkout, and no hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        patch.setenv("HF_HUB_OFFLINE", "1")
        found = Kernel(tmp_path_factory.mktemp("notebooks"))
        yield found
        found.stop()


def _named(name: str, **settings: str) -> Any:
    return with_settings(read(ROOT / "examples" / f"{name}.ipynb"), {**SMALL, **settings})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_without_a_gpu_a_notebook_says_so_at_once(path: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    notebook = read(path)
    names: dict[str, Any] = {}
    for cell in code_cells(notebook)[:2]:
        exec(compile(cell.source, path.name, "exec"), names)
    with pytest.raises(SystemExit, match=r"No GPU: this notebook .* set TINY = True in the settings"):
        exec(compile(tagged(notebook, "device").source, path.name, "exec"), names)


@pytest.mark.slow
def test_qwen3_qat(kernel: Kernel) -> None:
    *_, trained, report, answer, files = kernel.executed(_named("qwen3_qat"))
    assert "report:" in trained
    assert report.startswith("# ongrid: ") and "](data:image/png;base64," in report and "](plots/" not in report
    assert answer is not None and "config.json" in files and "model.safetensors" in files


@pytest.mark.slow
def test_compare_schemes(kernel: Kernel) -> None:
    *_, short, page = kernel.executed(_named("compare_schemes"))
    rows = {line.split()[0]: line.split()[1:] for line in short.splitlines()[1:]}
    assert set(rows) == {"int8-int4", "int3", "untouched"}
    assert rows["int3"][1] == "100.0%" and float(rows["int3"][2]) > 0
    assert page.lstrip().startswith("# ") or "\n# " in page


@pytest.mark.slow
def test_sweep(kernel: Kernel) -> None:
    *_, trials, page = kernel.executed(_named("sweep"))
    assert "trial 1 (2 of 2)" in trials and "best: trial" in trials
    assert "train.learning_rate" in page and "complete" in page


@pytest.mark.slow
def test_export_phone(kernel: Kernel) -> None:
    """ExecuTorch is not installed: the notebook says so and how to get it; the rest has run."""
    notebook = _named("export_phone", EXECUTORCH=repr("nowhere"))
    *_, report, export, tokenizer = kernel.executed(notebook)
    assert "executorch" in report
    assert "Not exported. ExecuTorch is not installed" in export and "quantize export --setup" in export
    assert tokenizer.strip().endswith("tokenizer.json True")
