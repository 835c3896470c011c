"""Draws docs/images/adapter.svg: where the adapter lies while training, and what ships of it.

python docs/_site/picture.py    # writes the file anew; a test compares
"""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "images" / "adapter.svg"

_LIGHT = (
    "--ink: #1f2328; --soft: #59636e; --line: #8b949e; --box: #f3f5f7; --good: #00695c; --bad: #b3261e; --paper: #fff"
)
_DARK = (
    "--ink: #e6edf3; --soft: #a6b0ba; --line: #7d8590; --box: #2b313a; --good: #5ad1bf; --bad: #ff8f86; "
    "--paper: #1e2129"
)
# By itself the drawing follows the reader's system, in a page of the site what is chosen there.
_STYLE = f"""
  .adapter {{ {_LIGHT} }}
  @media (prefers-color-scheme: dark) {{ .adapter {{ {_DARK} }} }}
  [data-md-color-scheme="default"] .adapter {{ {_LIGHT} }}
  [data-md-color-scheme="slate"] .adapter {{ {_DARK} }}"""
_STYLE += """
  .adapter .paper { fill: var(--paper) }
  .adapter text { fill: var(--ink); font: 15px system-ui, sans-serif; text-anchor: middle }
  .adapter .start { text-anchor: start }
  .adapter .head { font-weight: 600; font-size: 17px }
  .adapter .soft { fill: var(--soft); font-size: 13px }
  .adapter .good { fill: var(--good); font-weight: 600 }
  .adapter .bad { fill: var(--bad); font-weight: 600 }
  .adapter .box { fill: var(--box); stroke: var(--line) }
  .adapter .quantiser { stroke: var(--ink); stroke-width: 2 }
  .adapter .wire { fill: none; stroke: var(--line); stroke-width: 1.6; marker-end: url(#adapter-tip) }
  .adapter .same { fill: none; stroke: var(--good); stroke-width: 2; stroke-dasharray: 5 4 }
  .adapter .other { fill: none; stroke: var(--bad); stroke-width: 2; stroke-dasharray: 5 4 }
  .adapter .rule { stroke: var(--line); stroke-width: 1; stroke-dasharray: 2 5 }
  .adapter .tip { fill: var(--line) }
"""


def box(x: int, y: int, text: str, width: int = 92, kind: str = "") -> str:
    """A box around (x, y)."""
    shape = f'<rect class="box {kind}" x="{x - width // 2}" y="{y - 18}" width="{width}" height="36" rx="5"/>'
    return f'{shape}<text x="{x}" y="{y + 5}">{text}</text>'


def wire(*points: tuple[int, int]) -> str:
    """A line through points, with a tip."""
    return f'<path class="wire" d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def text(x: int, y: int, words: str, kind: str = "") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}">{words}</text>'


def outside(x: int) -> list[str]:
    """The adapter beside the fake quantiser: Unsloth, torchtune, plain PEFT with torchao."""
    return [
        text(x + 200, 34, "Adapter outside the fake quantiser", "head"),
        text(x + 200, 56, "Unsloth, torchtune", "soft"),
        text(x, 88, "trained", "soft start"),
        box(x + 46, 122, "W"), wire((x + 92, 122), (x + 142, 122)),
        box(x + 190, 122, "fq", kind="quantiser"), wire((x + 236, 122), (x + 296, 122), (x + 296, 146)),
        box(x + 46, 206, "B A"), wire((x + 92, 206), (x + 296, 206), (x + 296, 182)),
        text(x + 266, 115, "times x", "soft"), text(x + 266, 199, "times x", "soft"),
        box(x + 296, 164, "+", 36), wire((x + 314, 164), (x + 340, 164)), text(x + 352, 169, "y"),
        text(x + 190, 246, "y = fq(W) x + B A x", "head"),
        f'<line class="rule" x1="{x}" x2="{x + 400}" y1="266" y2="266"/>',
        text(x, 292, "shipped", "soft start"),
        box(x + 46, 324, "W + B A"), wire((x + 92, 324), (x + 142, 324)),
        box(x + 190, 324, "Q", kind="quantiser"), wire((x + 236, 324), (x + 340, 324)), text(x + 352, 329, "y"),
        text(x + 288, 317, "times x", "soft"),
        text(x + 190, 374, "y = Q(W + B A) x", "head"),
        f'<path class="other" d="M{x + 352} 182 L{x + 352} 310"/>',
        text(x + 190, 408, "another function: it was never trained", "bad"),
        text(x + 190, 430, "0.03 to 0.14 nats a token lost on the way", "soft"),
    ]  # fmt: skip


def inside(x: int) -> list[str]:
    """The adapter inside: ongrid."""
    return [
        text(x + 200, 34, "Adapter inside the fake quantiser", "head"),
        text(x + 200, 56, "ongrid", "soft"),
        text(x, 88, "trained", "soft start"),
        box(x + 46, 122, "W"), wire((x + 92, 122), (x + 118, 122), (x + 118, 146)),
        box(x + 46, 206, "s B A"), wire((x + 92, 206), (x + 118, 206), (x + 118, 182)),
        box(x + 118, 164, "+", 36), wire((x + 136, 164), (x + 160, 164)),
        box(x + 206, 164, "fq", kind="quantiser"), wire((x + 252, 164), (x + 340, 164)), text(x + 352, 169, "y"),
        text(x + 294, 157, "times x", "soft"),
        text(x + 190, 246, "y = fq(W + s B A) x", "head"),
        f'<line class="rule" x1="{x}" x2="{x + 400}" y1="266" y2="266"/>',
        text(x, 292, "shipped", "soft start"),
        box(x + 74, 324, "the integers of fq", 148), wire((x + 148, 324), (x + 340, 324)), text(x + 352, 329, "y"),
        text(x + 288, 317, "times x", "soft"),
        text(x + 190, 374, "y = Q(W + s B A) x", "head"),
        f'<path class="same" d="M{x + 352} 182 L{x + 352} 310"/>',
        text(x + 190, 408, "the same function, to the last bit", "good"),
        text(x + 190, 430, "0 nats a token; 0.0008 at most in tile-packed int4", "soft"),
    ]  # fmt: skip


def draw() -> str:
    """The drawing as SVG."""
    parts = [
        '<svg class="adapter" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 450" role="img">',
        "<title>Where the adapter lies while training, and what ships of it</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="adapter-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        '<rect class="paper" width="920" height="450" rx="8"/>',
        *outside(30),
        '<line class="rule" x1="460" x2="460" y1="20" y2="434"/>',
        *inside(500),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
