"""The notebooks of `examples/` as files: they hold no outputs, and install the version that they belong to."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from notebooks import NOTEBOOKS, ROOT, code_cells, read, tagged

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_four_and_the_page_lists_them() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"compare_schemes", "export_phone", "qwen3_qat", "sweep"}
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert all(f"`examples/{path.name}`" in page for path in NOTEBOOKS)


@each
def test_a_notebook_is_clean_python(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None
        compile(cell.source, f"{path.name}:{cell.id}", "exec")
        assert not re.search(r"""["'(]/\w|[A-Z]:\\""", cell.source), "an absolute path"
    names = re.findall(r"^([A-Z_]+(?:, [A-Z_]+)*) = ", tagged(notebook, "parameters").source, flags=re.MULTILINE)
    later = "\n".join(cell.source for cell in code_cells(notebook)[2:])
    for name in ", ".join(names).split(", "):
        assert re.search(rf"\b{name}\b", later), f"the setting {name} is read nowhere"


@each
def test_the_install_cell_names_this_version_and_runs_only_where_it_must(path: Path) -> None:
    notebook = read(path)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    cells = code_cells(notebook)
    install = tagged(notebook, "install")
    assert cells[0] is install and cells[1] is tagged(notebook, "parameters") and cells[2] is tagged(notebook, "device")
    (tag,) = re.findall(r"git\+https://[\w./-]+@v([\w.]+)\"", install.source)
    assert tag == version
    assert 'if importlib.util.find_spec("quantize") is None:' in install.source
    extras = re.search(r"ongrid\[([\w,]+)\]", install.source)
    assert extras is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= set(known)
