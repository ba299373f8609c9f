"""matplotlib drawings as SVG that belongs to the page: its text, its colours, its width.

matplotlib draws with stand-in colours, which are then replaced by the style sheet's variables, and text stays text:
so the same drawing is right on light and dark paper, and is searched and read out like the page around it.
"""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any
from zlib import crc32

INK, SOFT, RULE = "#010101", "#020202", "#030303"
"""Stand-ins for the page's text, its softer text, and its thin lines."""

COLORS = ("#0a0001", "#0a0002", "#0a0003", "#0a0004")
"""Stand-ins for the colours of lines, in their order."""

_VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", **{c: f"c{i}" for i, c in enumerate(COLORS, start=1)}}


def draw(paint: Callable[[Any], None], size: tuple[float, float], box: Sequence[float], words: str) -> str:
    """Return a figure with one pair of axes as an SVG element; `box` is left, bottom, right, top as shares."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": words,
        "font.size": 8,
        "axes.edgecolor": RULE,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "text.color": INK,
        "legend.labelcolor": INK,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": SOFT,
        "ytick.labelcolor": SOFT,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "lines.solid_joinstyle": "round",
    }
    with rc_context(style):
        drawing = Figure(figsize=size)
        left, bottom, right, top = box
        paint(drawing.add_axes((left, bottom, right - left, top - bottom)))
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(buffer.getvalue(), words)


def _inlined(svg: str, words: str) -> str:
    """Return the <svg> element alone, in the page's colours and letters, with ids that no other drawing has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    view = re.search(r'viewBox="([^"]*)"', svg)
    label = escape(words, quote=True)
    opening = f'<svg viewBox="{view.group(1) if view else ""}" role="img" aria-label="{label}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # as some versions write it
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = svg.replace("xlink:href=", "href=")
    # Groups are named figure_1, axes_1 and so on in every drawing, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    salt = f"d{crc32(words.encode()):08x}-"
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{salt}", svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def tick(value: float) -> str:
    """Return a tick's label, short: 25k, 0.25, 5e-4."""
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for factor, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{sign}"
    return f"{value:.5g}".replace("-", "−")
