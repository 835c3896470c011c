"""docs/adding-a-format.md, block by block: its numbers, its layout and its entry work as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType

import pytest

from quantize import integers, layouts, schemes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-format.md"


def test_the_page_adds_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    numbers, layout, entry, *proofs = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert "int8-int3" not in schemes.SCHEMES and len(proofs) == 2
    in_integers = dict(vars(integers))
    exec("from __future__ import annotations\n" + numbers, in_integers)
    monkeypatch.setattr(integers, "INT8_INT3", in_integers["INT8_INT3"], raising=False)
    in_layouts = dict(vars(layouts))
    exec("from __future__ import annotations\n" + layout, in_layouts)
    added = eval(entry, dict(vars(schemes)) | {"int8_int3": in_layouts["int8_int3"]})
    monkeypatch.setattr(schemes, "SCHEMES", MappingProxyType({**schemes.SCHEMES, added.name: added}))
    assert added.bits_on_disk(added.find_target("cpu")) == 8.5
    for proof in proofs:
        exec(proof, in_integers)
