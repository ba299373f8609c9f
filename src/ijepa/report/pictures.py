"""Pictures as HTML: PNGs inside the page, masks drawn over images, grids, strips and legends. Nothing is computed here.

Images keep their pixels and are enlarged by the page, maps of patches and masks without smoothing; what lies over an
image is SVG, sharp at any size. A 64-pixel image so takes ten kilobytes, and a map of patches a few hundred bytes.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from ijepa.report.markup import scrolling

Pixels = npt.NDArray[np.uint8]
Palette = Sequence[tuple[int, int, int]]

TARGETS = ("#ffb000", "#ff5ca8", "#35d0ff", "#9dff57")
"""Colours of target blocks: bright, apart for most colour-blind eyes, over a dark rim."""

_CLASSES = (
    (38, 43, 51), (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (153, 221, 255), (170, 170, 0), (128, 64, 160), (120, 200, 120),
)  # fmt: skip
IGNORED = (200, 200, 200)


def png(pixels: Pixels, most: int | None = None, *, exact: bool = False) -> str:
    """Return pixels (H, W, 3) as a data URI; the longer side is at most `most`, colours stay as they are if `exact`."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if most is not None:
        image.thumbnail((most, most), Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(pixels: Pixels, words: str, *, most: int | None = None, exact: bool = False) -> str:
    """Return an image with its words for those who do not see it; `exact` shows every pixel as a square."""
    kind = ' class="exact"' if exact else ""
    return f'<img{kind} src="{png(pixels, most, exact=exact)}" alt="{escape(words, quote=True)}">'


def colours(pixels: npt.NDArray[np.floating]) -> Pixels:
    """Return colours in [0, 1] as bytes."""
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def class_colour(label: int) -> tuple[int, int, int]:
    """Return a class's colour, dark for class 0; from the palette's end on, by turning the hue by the golden ratio."""
    if label < len(_CLASSES):
        return _CLASSES[label]
    from colorsys import hls_to_rgb

    turn = label * 0.61803398875 % 1
    red, green, blue = hls_to_rgb(turn, (0.45, 0.6, 0.75)[label % 3], 0.6)
    return round(255 * red), round(255 * green), round(255 * blue)


def class_map(labels: npt.NDArray[np.integer], classes: int, palette: Palette = ()) -> Pixels:
    """Return class numbers (H, W) in their colours (H, W, 3); numbers that are no class are grey.

    `palette` holds the set's own colours, where it has some; else they are `class_colour`'s.
    """
    painted = np.empty((*labels.shape, 3), dtype=np.uint8)
    for label in np.unique(labels):
        painted[labels == label] = _shown(int(label), classes, palette)
    return painted


def class_legend(labels: Sequence[int], names: Sequence[str], palette: Palette = ()) -> str:
    """Return the colours and names of the classes seen; numbers without a name are "not scored"."""
    entries = []
    for label in sorted(set(labels)):
        name = names[label] if label < len(names) else "not scored"
        entries.append((_shown(label, len(names), palette), name))
    return legend(entries)


def _shown(label: int, classes: int, palette: Palette) -> tuple[int, int, int]:
    if label >= classes:
        return IGNORED
    return palette[label] if palette else class_colour(label)


def legend(entries: Sequence[tuple[str | tuple[int, int, int], str]]) -> str:
    """Return a line of colours with their meaning."""
    items = []
    for colour, words in entries:
        code = colour if isinstance(colour, str) else "rgb({}, {}, {})".format(*colour)
        items.append(f'<span><i class="swatch" style="background: {code}"></i>{escape(words)}</span>')
    return f'<p class="legend">{"".join(items)}</p>'


def masked(
    pixels: Pixels, context: npt.NDArray[np.bool_], targets: npt.NDArray[np.bool_], patch: int, words: str
) -> str:
    """Return an image (H, W, 3) with its context (h, w) tinted, the rest darkened, its targets (T, h, w) outlined."""
    height, width = pixels.shape[:2]
    unit = max(height, width) / 100
    shapes = [
        f'<image href="{png(pixels)}" width="{width}" height="{height}"/>',
        f'<path class="hidden" d="{_cells(~context, patch)}"/>',
        f'<path class="context" d="{_cells(context, patch)}"/>',
    ]
    for number, target in enumerate(targets):
        if not target.any():
            continue
        rows, columns = np.flatnonzero(target.any(1)), np.flatnonzero(target.any(0))
        inset = (0.9 + 0.9 * number) * unit  # outlines that share an edge lie beside one another
        x, y = columns[0] * patch + inset, rows[0] * patch + inset
        w, h = (len(columns) * patch - 2 * inset), (len(rows) * patch - 2 * inset)
        box = f'x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}"'
        shapes.append(f'<rect class="rim" {box} stroke-width="{2.6 * unit:.2f}"/>')
        colour = TARGETS[number % len(TARGETS)]
        shapes.append(f'<rect {box} fill="none" stroke="{colour}" stroke-width="{1.5 * unit:.2f}"/>')
    label = escape(words, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'


def _cells(chosen: npt.NDArray[np.bool_], patch: int) -> str:
    """Return the outline of patches (h, w), a rectangle for each run within a row."""
    path = []
    for row, cells in enumerate(chosen):
        edges = np.flatnonzero(np.diff(cells, prepend=False, append=False))
        for left, right in edges.reshape(-1, 2) * patch:
            path.append(f"M{left} {row * patch}H{right}V{(row + 1) * patch}H{left}Z")
    return "".join(path)


def grid(rows: Sequence[tuple[str, Sequence[str]]], label: str, *, cell: int = 96) -> str:
    """Return rows of pictures, each with its name at the left; cells are at least `cell` pixels wide."""
    columns = max(len(cells) for _, cells in rows)
    body = "".join(
        f'<div class="name">{escape(name)}</div>' + "".join(f"<div>{picture}</div>" for picture in cells)
        for name, cells in rows
    )
    style = f"grid-template-columns: 5.2em repeat({columns}, minmax({cell}px, 1fr))"
    return scrolling(f'<div class="grid" style="{style}">{body}</div>', label)


def hit(pixels: Pixels, right: bool | None, words: str) -> str:
    """Return a found image in a border that says whether it is right, by colour and by sign; None says neither."""
    image = picture(pixels, words, most=96)
    if right is None:
        return f'<span class="hit">{image}</span>'
    kind, sign = ("right", "✓") if right else ("wrong", "✗")
    return f'<span class="hit {kind}">{image}<b aria-hidden="true">{sign}</b></span>'


def strips(head: Sequence[str], rows: Sequence[Sequence[Sequence[str]]], label: str) -> str:
    """Return strips of pictures side by side: `rows` of groups of pictures, with a name over each group."""
    groups = [len(group) for group in rows[0]]
    columns = " 1.2em ".join(f"repeat({count}, minmax(52px, 1fr))" for count in groups)
    gap = '<div class="between"></div>'
    top = gap.join(
        f'<div class="over" style="grid-column: span {count}">{escape(name)}</div>'
        for name, count in zip(head, groups, strict=True)
    )
    body = "".join(gap.join("".join(f"<div>{cell}</div>" for cell in group) for group in row) for row in rows)
    return scrolling(f'<div class="grid strips" style="grid-template-columns: {columns}">{top}{body}</div>', label)
