"""What the figures share: the canvas, colours, intervals as lines, and names that fit and that the font can write.

Each figure is made for the width of a phone (about 380 pixels); a wide page sets them side by side.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREY = "#2f6db5", "#777777"
COLOURS = ("#2f6db5", "#c8641b", "#3c8d5a", "#9a5fb0", "#b03a4a", "#2a93a8", "#8a6d1f", "#5b5b5b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 7 markers and 8 colours: 56 runs before a pair comes again
ROW = 0.34  # inches of a row of intervals
_WIDTH = 5.2  # inches; at 72 points an inch, so that 9 points of text are 9 pixels at 375 pixels' width
_LONGEST = 32  # characters of a name in a figure
_WIDEST = 185.0  # points: half of the figure, where the letters are wide ones
_STYLE: dict[str, Any] = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "svg.fonttype": "none", "text.parse_math": False,
    "font.family": "sans-serif", "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        name: of its file, and of W&B's panel.
        caption: what it shows, for those who cannot see it too.
        svg: as an element to set into a page. png: the same as an image.
    """

    name: str
    caption: str
    svg: str
    png: bytes


def draw_figure(name: str, caption: str, height: float, draw: Callable[[Figure], bool]) -> Plot | None:
    """One figure, `height` inches high; None where `draw` says that there is nothing to show."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):  # the salt keeps ids of figures in one page apart
        figure = Figure(figsize=(_WIDTH, height))
        if not draw(figure):
            return None
        return Plot(name, caption, _svg(figure, caption), _png(figure))


def _svg(figure: Figure, caption: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    element = text[text.index("<svg") :]
    # Scaled by its viewBox to the page's width; the caption is its name for screen readers.
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    label = caption.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    element = re.sub("<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return element.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160, facecolor="white")
    return stream.getvalue()


def figure_names(names: Sequence[str]) -> list[str]:
    """The names as figures show them: short, of letters that the font has (else ?), and no two alike."""
    found: list[str] = []
    for name in names:
        label, number = _shorten(_printable(name)), 1
        while (shown := label if number == 1 else f"{label} ({number})") in found:
            number += 1
        found.append(shown)
    return found


def spelled_out(names: Sequence[str]) -> str:
    """For a caption: which names stand behind labels that had to lose letters; nothing where none had to."""
    pairs = [
        f"{label} = {name}"
        for name, label in zip(names, figure_names(names), strict=True)
        if _printable(name).count("?") > name.count("?")
    ]
    return f" (letters that the figure's font lacks: {'; '.join(pairs)})" if pairs else ""


def _printable(name: str) -> str:
    """One line of characters that matplotlib's font has; a box and a warning would be all that the others give."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=["sans-serif"])))
    kept = (" " if unicodedata.category(char)[0] in "CZ" else char for char in name)
    shown = "".join(char if font.get_char_index(ord(char)) else "?" for char in kept)
    return shown.strip().lstrip("_") or "?"  # a label that begins with _ is one that matplotlib hides


def _shorten(name: str) -> str:
    """Cut in the middle: names of a sweep's trials differ at their ends."""
    length = min(len(name), _LONGEST)
    while True:
        head = (length - 1) // 2
        shown = name if length == len(name) else f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
        if length <= 8 or _points_wide(shown) <= _WIDEST:
            return shown
        length -= 2


def _points_wide(text: str) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=["sans-serif"], size=10)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width)


def draw_intervals(axes: Axes, rows: Sequence[tuple[str, Interval]]) -> bool:
    """A line for each interval, one below the other, and the line of no difference."""
    for position, (_, found) in enumerate(rows):
        lengths = bar_lengths(found.value, found.low, found.high)
        axes.errorbar(found.value, -position, xerr=lengths, fmt="o", color=BLUE, capsize=3, ms=5)
    label_rows(axes, [name for name, _ in rows])
    return bool(rows)


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of rows 0, -1, -2, ... and the line of no difference."""
    axes.axvline(0, color=GREY, lw=1, ls="--")
    axes.set_yticks([-position for position in range(len(names))], figure_names(names))
    axes.set_ylim(-len(names) + 0.4, 0.6)


def bar_lengths(value: float, low: float | None, high: float | None) -> list[list[float]]:
    """What errorbar takes; a bound may lie on the value's other side by a rounding, and one that is None is none."""
    return [[0.0 if low is None else max(0.0, value - low)], [0.0 if high is None else max(0.0, high - value)]]


def legend_below(figure: Figure, entries: int, columns: int = 3, handles: Sequence[Any] = ()) -> None:
    """One legend for the whole figure, where no point can lie; `legend_height` makes room for it."""
    options: dict[str, Any] = {"handles": list(handles)} if handles else {}
    figure.legend(
        loc="outside lower center", ncols=min(entries, columns), frameon=False, fontsize=9, handletextpad=0.5,
        columnspacing=1.2, **options,
    )  # fmt: skip


def legend_height(names: Sequence[str]) -> tuple[float, int]:
    """Inches and columns of a legend with these labels."""
    columns = 3 if max((len(name) for name in figure_names(names)), default=0) <= 14 else 1
    return 0.2 * -(-len(names) // columns), columns
