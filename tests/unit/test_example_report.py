"""The quickstart's report that is committed as an example, and the README's table, tell the same numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quantize.arms import arm_rows, format_accuracy, format_difference, format_loss, format_size
from quantize.document import Paragraph, to_markdown
from quantize.verdict import verdict

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "quickstart"
METRICS = json.loads((EXAMPLE / "metrics.json").read_text())


@pytest.mark.parametrize("document", ["README.md", "docs/RESULTS.md"])
def test_a_documents_table_is_that_of_the_example(document: str) -> None:
    text = (ROOT / document).read_text().replace("*", "")
    rows = {row.name: row for row in arm_rows(METRICS)}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    found = {cells[0]: cells for cells in lines if cells[0] in rows and len(cells) == 6}
    assert set(found) == set(rows)
    for name, (_, _, loss, difference, accuracy, size) in found.items():
        row = rows[name]
        shown = "" if name == "base" else format_difference(row.loss_vs_base)
        assert [loss, difference, accuracy, size] == [
            format_loss(row.loss), shown, format_accuracy(row.accuracy), format_size(row.size_mib)
        ]  # fmt: skip


def test_the_example_is_what_this_version_writes_and_asks_nobody() -> None:
    report = (EXAMPLE / "report.md").read_text()
    for sentence in verdict(METRICS):
        assert to_markdown([Paragraph(sentence)]).strip() in report
    for name in re.findall(r"\]\((plots/[^)]+)\)", report):
        assert (EXAMPLE / name).stat().st_size > 1000
    page = (EXAMPLE / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!["']?#)|@import""", page)
    assert METRICS["train_ship_gap"] == 0.0 and METRICS["cost"]["ratio"]["peak_mib"] < 1
