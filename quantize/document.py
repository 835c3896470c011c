"""A report's text as a list of blocks, written as Markdown or as one self-contained HTML page.

Both come from the same blocks, so they cannot say different things. Everything is escaped on the way out: names of
layers, files and models are the user's.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text; `strong` sets it apart, as a warning or the verdict."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Items:
    """A bulleted list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Commands, code or settings to copy."""

    text: str
    language: str = "bash"


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns named in `numeric` (by index) are set flush right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A picture: a file beside the Markdown, and the same as an SVG element to set into the page."""

    file: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Figures:
    """Pictures, side by side where the page is wide."""

    figures: Sequence[Figure]


Block = Heading | Paragraph | Items | Code | Table | Figures


def to_markdown(blocks: Sequence[Block]) -> str:
    """GitHub-flavoured Markdown, blocks separated by blank lines."""
    return "\n\n".join(text for text in map(_markdown, blocks) if text) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One HTML page without outside references, readable on a phone and in dark mode."""
    body = "\n".join(text for text in map(_html, blocks) if text)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape(text)}"
        case Paragraph(text, strong):
            return f"**{_escape(text)}**" if strong else _escape(text)
        case Items(texts):
            return "\n".join(f"- {_escape(text)}" for text in texts)
        case Code(text, language):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{fence}{language}\n{text}\n{fence}"
        case Table(header, rows, numeric):
            rules = ["---:" if column in numeric else "---" for column in range(len(header))]
            cells = [[_escape(cell) for cell in header], rules, *([_escape(cell) for cell in row] for row in rows)]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)
        case Figures(figures):
            return "\n\n".join(f"![{_escape(each.caption)}]({each.file})" for each in figures)


# Only what would act as GitHub's Markdown: an underscore inside a word, a bracket without a target or an ampersand that
# begins no entity is left readable. Two dollars make a formula, two tildes strike out, "1. " and "- " begin a list.
_ACTIVE = re.compile(
    r"([\\`*<|$~]|^[#>]|^[-+](?= )|(?<=^\d)[.)](?= )|(?<=^\d\d)[.)](?= )"
    r"|&(?=#?\w+;)|(?<!\w)_|_(?!\w)|\](?=[(\[:]))"
)


def _escape(text: str) -> str:
    """Text as it is: no character of it starts Markdown or HTML."""
    return _ACTIVE.sub(r"\\\1", " ".join(text.split()))


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text, strong):
            return f'<p class="strong">{html.escape(text)}</p>' if strong else f"<p>{html.escape(text)}</p>"
        case Items(texts):
            return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>" if texts else ""
        case Code(text, _):
            return f"<pre><code>{html.escape(text)}</code></pre>"
        case Table(header, rows, numeric):
            head = "".join(_cell("th", cell, column in numeric) for column, cell in enumerate(header))
            body = "".join(
                f"<tr>{''.join(_cell('td', cell, column in numeric) for column, cell in enumerate(row))}</tr>"
                for row in rows
            )
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Figures(figures):
            each = (f"<figure>{one.svg}<figcaption>{html.escape(one.caption)}</figcaption></figure>" for one in figures)
            return f'<div class="figures">{"".join(each)}</div>'


def _cell(tag: str, text: str, numeric: bool) -> str:
    return f"<{tag}{' class=number' if numeric else ''}>{html.escape(text)}</{tag}>"


_CSS = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.strong { font-weight: 600; border-left: 4px solid #4a7dbd; padding-left: .75rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }
td, li, p { white-space: pre-wrap; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; padding: .75rem; background: #8882; border-radius: .25rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.figures { gap: 1.5rem; margin: 1.5rem 0; }
figure { margin: 0; } figcaption { font-size: .85rem; opacity: .8; }
svg { width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg); } }
"""
