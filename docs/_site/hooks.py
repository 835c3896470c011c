"""What the site's build adds to the pages, so that nothing of it can go stale. Imports no torch.

A page names what belongs in it by a line `<!-- generated: NAME -->`, NAME one of `GENERATED`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import tables  # noqa: E402  # beside this file, which is no package
from mkdocs.structure.files import File  # noqa: E402

_REPORT = "quickstart/page.html"
_NOTE = """!!! note
    This is `report.md` of the quickstart. Its [`report.html`]({name}) has figures to look into."""
_MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_PICTURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<file>[\w/.]+\.svg)\)")
_LINK = re.compile(r"\]\((?!https?:)(?P<place>[^)#]+)(?P<anchor>#[^)]*)?\)")


def top_level(name: str) -> str:
    """A Markdown file beside the packages, with its links as they are from a page; those to files of the code go."""

    def moved(link: re.Match[str]) -> str:
        place, anchor = link["place"], link["anchor"] or ""
        return f"]({place.removeprefix('docs/')}{anchor})" if place.startswith("docs/") else "]"

    return _LINK.sub(moved, (ROOT / name).read_text(encoding="utf-8"))


GENERATED: dict[str, Callable[[], str]] = {
    "configuration": tables.configuration,
    "train": tables.train_command,
    "quantize": tables.quantize_command,
    "formats": tables.formats,
    "algorithms": tables.algorithms,
    "contributing": lambda: top_level("CONTRIBUTING.md"),
    "changes": lambda: top_level("CHANGELOG.md"),
}


def on_config(config: Any) -> Any:
    """Takes back the script that the plugin `offline` adds from a host elsewhere; search-from-disk.js does as much."""
    config.extra["polyfills"] = []
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the example's report.html under another name: its report.md becomes a page that is called so."""
    files.append(File.generated(config, _REPORT, abs_src_path=str(ROOT / "docs" / "quickstart" / "report.html")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Puts in what the page names."""
    if page.file.src_uri == "quickstart/report.md":
        title, _, rest = markdown.partition("\n")
        markdown = f"{title}\n\n{_NOTE.format(name=Path(_REPORT).name)}\n{rest}"
    markdown = _MARKER.sub(lambda marker: GENERATED[marker[1]](), markdown)
    folder = Path(page.file.abs_src_path).parent
    return _PICTURE.sub(lambda found: _inline(folder / found["file"], found["text"]), markdown)


def _inline(file: Path, text: str) -> str:
    """A drawing as a part of the page, where it takes the page's light or dark colours."""
    drawing = file.read_text(encoding="utf-8")
    drawing = drawing[drawing.index("<svg") :]
    return f'<figure class="drawing" role="img" aria-label="{text}">{drawing}</figure>'
