"""What a finished run hands back, and how a notebook shows it."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FIGURE = re.compile(r"\]\((plots/[\w.-]+\.png)\)")


class Report(str):
    """The text of report.md; a notebook shows it as a page, its figures in it.

    Attributes:
        folder: the run directory, beside whose report the figures lie.
    """

    folder: Path = Path()

    @classmethod
    def of(cls, text: str, folder: Path) -> Report:
        """The report of the run in `folder`."""
        report = cls(text)
        report.folder = folder
        return report

    def _repr_markdown_(self) -> str:
        def inside(match: re.Match[str]) -> str:
            figure = self.folder / match[1]
            if not figure.is_file():
                return match[0]
            return f"](data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()})"

        return _FIGURE.sub(inside, self)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        path: the run directory.
        metrics: the contents of metrics.json.
        report: the text of report.md, which a notebook shows as a page.
    """

    path: Path
    metrics: dict[str, Any]
    report: Report

    @property
    def shipped(self) -> Path | None:
        """The folder of the quantised checkpoint; None where there is none (see `not_shipped`)."""
        return None if self.not_shipped else self.path / "quantized"

    @property
    def not_shipped(self) -> str | None:
        """Why there is no quantised checkpoint, and what makes one; None where there is."""
        if self.metrics["scheme"] is None:
            return "the run has neither qat nor quantize.scheme, so that nothing was quantised"
        if not self.metrics["simulated"]:
            return None
        missing = "; ".join(self.metrics["missing"])
        return f"this machine lacks {missing}, so that the numbers are simulated; {self.metrics['finish_command']}"

    def __repr__(self) -> str:
        return f"RunResult(path={str(self.path)!r}, shipped={self.shipped and str(self.shipped)!r})"

    def _repr_markdown_(self) -> str:
        return self.report._repr_markdown_()
