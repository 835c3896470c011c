"""The notebooks of `examples/`, their cells by tag, and how the tests run one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(path: Path) -> Any:
    """The notebook."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    """Its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: Any, tag: str) -> Any:
    """The one cell with this tag."""
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", []))
    return cell


def with_settings(notebook: Any, settings: dict[str, str]) -> Any:
    """The notebook with other settings: name -> the expression that its first line assigns."""
    cell = tagged(notebook, "parameters")
    lines = cell.source.splitlines()
    for name, value in settings.items():
        (place,) = (number for number, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[place] = f"{name} = {value}"
    cell.source = "\n".join(lines)
    return notebook


class Kernel:
    """One process for all notebooks, in which the libraries are imported once; each starts without a name of others."""

    def __init__(self, folder: Path) -> None:
        from jupyter_client.manager import AsyncKernelManager

        self.folder, self.manager = folder, AsyncKernelManager(kernel_name="python3")

    def executed(self, notebook: Any) -> list[str]:
        """What each cell of code printed or showed, run from the first to the last.

        Raises:
            nbclient.exceptions.CellExecutionError: a cell failed.
        """
        from nbclient import NotebookClient

        notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
        place = {"metadata": {"path": str(self.folder)}}
        NotebookClient(notebook, timeout=240, km=self.manager, resources=place).execute()
        return ["\n".join(map(_text, cell.outputs)) for cell in code_cells(notebook)[1:]]

    def stop(self) -> None:
        """Ends the process."""
        from nbclient.util import run_sync

        run_sync(self.manager.shutdown_kernel)(now=True)


def _text(output: Any) -> str:
    data = output.get("data", {})
    return str(output.get("text") or data.get("text/markdown") or data.get("text/plain") or output.get("evalue", ""))
