"""A matplotlib Figure as a small SVG that reads on light and on dark pages."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

INK = "#000000"
"""matplotlib's black becomes the ink of the page that shows the figure."""

ALONE = ("<style>svg{color:#1c2430;background:#fff}"
         "@media(prefers-color-scheme:dark){svg{color:#e3e8ef;background:#14181f}}</style>")
"""Ink and paper where the file is opened by itself; `inline` takes it out."""


def from_figure(fig: Any, name: str) -> str:
    """Draws `fig`.

    Args:
      fig: a matplotlib Figure.
      name: unique on a page; prefixes all ids, so that figures on one page do not borrow each other's clip paths.

    Returns:
      SVG text: transparent, text as text, black as `currentColor`.
    """
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The text stays text: the reader's fonts have the glyphs that matplotlib's lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        fig.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04,
                    metadata={"Date": None})
    return _restyle(buffer.getvalue(), name)


def _restyle(text: str, name: str) -> str:
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.S)
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"((?:fill|stroke): ?)" + INK, r"\1currentColor", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r"\n\s*", "\n", text)
    opening = '<svg fill="currentColor" stroke-linejoin="round" '
    return re.sub(r"<svg ([^>]*)>", lambda m: opening + m.group(1) + ">" + ALONE, text, count=1)


def inline(text: str) -> str:
    """The SVG for use inside a page: as wide as its box, but never too small to read, in the page's ink.

    The page says what it shows (caption and alternative text), so the drawing itself is hidden from readers.
    """
    text = text.replace(ALONE, "", 1)
    head, rest = text.split(">", 1)
    width = re.search(r'\swidth="([\d.]+)pt"', head)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    pixels = float(width.group(1)) * 4 / 3 if width else 0
    smallest = (0.65 if pixels < 520 else 0.8) * pixels  # a small figure fits a phone whole, a wide one scrolls
    size = f' aria-hidden="true" style="width:min(100%,{pixels:.0f}px);min-width:{smallest:.0f}px"' if pixels else ""
    return f"{head}{size}>{rest}"
