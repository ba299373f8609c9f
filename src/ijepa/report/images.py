"""Images of the page: PNG data URIs, mask overlays, class colors. The templates turn them into HTML.

Images keep their own resolution. The page enlarges them, patch maps and masks without smoothing, so that a 64-pixel
image takes 10 KB and a patch map a few hundred bytes. Mask overlays are SVG shapes, which are sharp at any size.
"""

import base64
import colorsys
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

TARGET_COLORS = ("#ffb000", "#ff5ca8", "#35d0ff", "#9dff57")
"""Outlines of target blocks: bright, and different to most color-blind readers."""

THUMBNAIL = 160
"""Longer side of an image in a row of images, in pixels."""

_CLASS_COLORS = (
    (38, 43, 51), (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (153, 221, 255), (170, 170, 0), (128, 64, 160), (120, 200, 120),
)  # fmt: skip
_IGNORED_COLOR = (200, 200, 200)


@dataclass(frozen=True)
class Overlay:
    """Masks over an image, in its pixels: SVG paths, and rectangles (x, y, width, height, color) of a line width."""

    width: int
    height: int
    hidden: str
    context: str
    outlines: tuple[tuple[float, float, float, float, str], ...]
    line: float


@dataclass(frozen=True)
class Picture:
    """One image with its alternative text.

    Attributes:
        uri: the image as a data URI.
        alt: what the image shows.
        exact: whether the page enlarges it without smoothing.
        overlay: masks over the image.
        correct: in a retrieval, whether it shows the class of the query; None if unknown.
    """

    uri: str
    alt: str
    exact: bool = False
    overlay: Overlay | None = None
    correct: bool | None = None


@dataclass(frozen=True)
class Grid:
    """Rows of pictures, each with its name; cells are at least `cell` pixels wide."""

    label: str
    rows: Sequence[tuple[str, Sequence[Picture]]]
    cell: int = 96


def data_uri(content: bytes, kind: str) -> str:
    """Return an image file as a data URI; `kind` is png or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(pixels: Pixels, alt: str, *, max_side: int | None = None, exact: bool = False) -> Picture:
    """Return pixels (H, W, 3) as a PNG, reduced to `max_side`; `exact` reduces and enlarges without smoothing."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return Picture(data_uri(buffer.getvalue(), "png"), alt, exact)


def masked_picture(
    pixels: Pixels, context: npt.NDArray[np.bool_], targets: npt.NDArray[np.bool_], patch: int, alt: str
) -> Picture:
    """Return an image (H, W, 3) with tinted context (h, w), the other patches dark, and outlined targets (T, h, w)."""
    height, width = pixels.shape[:2]
    unit = max(height, width) / 100
    outlines = []
    for number, target in enumerate(targets):
        if not target.any():
            continue
        rows, columns = np.flatnonzero(target.any(1)), np.flatnonzero(target.any(0))
        inset = (0.9 + 0.9 * number) * unit  # so that outlines on the same edge are next to each other
        x, y = columns[0] * patch + inset, rows[0] * patch + inset
        size = len(columns) * patch - 2 * inset, len(rows) * patch - 2 * inset
        outlines.append((x, y, *size, TARGET_COLORS[number % len(TARGET_COLORS)]))
    shapes = _patch_path(~context, patch), _patch_path(context, patch)
    return Picture(picture(pixels, alt).uri, alt, overlay=Overlay(width, height, *shapes, tuple(outlines), 1.5 * unit))


def _patch_path(selected: npt.NDArray[np.bool_], patch: int) -> str:
    """Return an SVG path around the selected patches (h, w), one rectangle for each run of patches in a row."""
    path = []
    for row, cells in enumerate(selected):
        edges = np.flatnonzero(np.diff(cells, prepend=False, append=False))
        for left, right in edges.reshape(-1, 2) * patch:
            path.append(f"M{left} {row * patch}H{right}V{(row + 1) * patch}H{left}Z")
    return "".join(path)


def to_bytes(colors: npt.NDArray[np.floating]) -> Pixels:
    """Return colors in [0, 1] as bytes."""
    return np.rint(np.clip(colors, 0, 1) * 255).astype(np.uint8)


def heat_map(cosine: npt.NDArray[np.floating]) -> Pixels:
    """Return cosines (..., h, w) as colors (..., h, w, 3): dark at 0 and below, bright at 1, NaN gray."""
    from matplotlib import colormaps

    painted = to_bytes(np.asarray(colormaps["viridis"](np.nan_to_num(cosine).clip(0, 1)))[..., :3])
    painted[np.isnan(cosine)] = 128
    return painted


def class_color(label: int, classes: int, palette: Sequence[Color] = ()) -> Color:
    """Return the color of a class: from `palette` if there is one, and gray for labels that are not a class.

    Without a palette, class 0 is dark, and classes after the twelfth differ by hue (steps of the golden ratio).
    """
    if label >= classes:
        return _IGNORED_COLOR
    if palette:
        return palette[label]
    if label < len(_CLASS_COLORS):
        return _CLASS_COLORS[label]
    red, green, blue = colorsys.hls_to_rgb(label * 0.61803398875 % 1, (0.45, 0.6, 0.75)[label % 3], 0.6)
    return round(255 * red), round(255 * green), round(255 * blue)


def class_map(labels: npt.NDArray[np.integer], classes: int, palette: Sequence[Color] = ()) -> Pixels:
    """Return class labels (H, W) in the colors of `class_color`, (H, W, 3)."""
    painted = np.empty((*labels.shape, 3), dtype=np.uint8)
    for label in np.unique(labels):
        painted[labels == label] = class_color(int(label), classes, palette)
    return painted


def class_legend(labels: Iterable[int], names: Sequence[str], palette: Sequence[Color] = ()) -> list[tuple[str, str]]:
    """Return the CSS color and the name of each label; labels without a name are "not scored"."""
    return [
        (
            "rgb({}, {}, {})".format(*class_color(label, len(names), palette)),
            names[label] if label < len(names) else "not scored",
        )
        for label in sorted(set(labels))
    ]
