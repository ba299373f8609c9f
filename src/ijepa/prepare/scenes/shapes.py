"""The eight shapes of the built-in scenes, with the same area and nearly the same edge length.

Only the form of a shape must predict its class, so simpler statistics are matched: every shape has area 1, its centroid
at the origin, and a perimeter of 6.1 to 6.2. (A disc of area 1 has 3.5, a square 4, so the shapes have holes, notches
or several parts.)

Shapes are signed distances, negative inside, in units of the square root of the area. The plain formulas below are
evaluated once into a table, so that all classes take the same time to draw.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.floating]

CLASSES = ("ring", "frame", "cross", "star", "crescent", "hourglass", "bars", "dots")
EXTENT = 1.15
"""Largest distance of a shape from its centroid, in square roots of its area."""
TILT = 0.3
"""Angle by which the shapes are turned in the tables: a straight edge along the cells would be rounded as a whole."""
RESOLUTION = 192
"""Cells along one side of a table. For a shape of 14 pixels, a cell is a ninth of a pixel."""


@cache
def distance_tables() -> Plane:
    """Return (classes, RESOLUTION, RESOLUTION) distances over [-EXTENT, EXTENT] squared, y before x, tilted."""
    x, y, _ = _grid(RESOLUTION, EXTENT)
    x, y = np.cos(TILT) * x + np.sin(TILT) * y, np.cos(TILT) * y - np.sin(TILT) * x
    return np.stack([signed_distance(name, x, y).astype(np.float32) for name in CLASSES])


def signed_distance(name: str, x: Plane, y: Plane) -> Plane:
    """Return the distance of points x, y to the edge of a shape, negative inside; area 1, centroid at (0, 0)."""
    unit, center_x, center_y = _measure(name)
    distance: Plane = _SHAPES[name](x * unit + center_x, y * unit + center_y) / unit
    return distance


@cache
def _measure(name: str) -> tuple[float, float, float]:
    """Return the square root of the area of a shape's formula, and the x and y of its centroid."""
    x, y, cell = _grid(1024, 1.5)
    covered = np.clip(0.5 - _SHAPES[name](x, y) / cell, 0, 1)
    area = float(covered.sum())
    return np.sqrt(area) * cell, float((x * covered).sum()) / area, float((y * covered).sum()) / area


def _grid(cells: int, extent: float) -> tuple[Plane, Plane, float]:
    """Return x and y at the centers of `cells` x `cells` over [-extent, extent] squared, and the side of a cell."""
    cell = 2 * extent / cells
    axis: Plane = (np.arange(cells) + 0.5) * cell - extent
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y, cell


def _disc(x: Plane, y: Plane, radius: float) -> Plane:
    return np.hypot(x, y) - radius


def _box(x: Plane, y: Plane, half_width: float, half_height: float) -> Plane:
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _polygon(x: Plane, y: Plane, corners: npt.NDArray[np.float64]) -> Plane:
    """Return the exact signed distance to a simple polygon with corners (n, 2); the sign follows the even-odd rule."""
    least, inside = np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        least = np.minimum(least, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ey:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / ey * ex)
    return np.where(inside, -least, least)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.maximum(_disc(x, y, 1.0), -_disc(x, y, 0.5))


def _frame(x: Plane, y: Plane) -> Plane:
    return np.maximum(_box(x, y, 1.0, 1.0), -_box(x, y, 0.4, 0.4))


def _cross(x: Plane, y: Plane) -> Plane:
    return np.minimum(_box(x, y, 1.0, 0.24), _box(x, y, 0.24, 1.0))


def _star(x: Plane, y: Plane) -> Plane:
    angle = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2, 0.436, 1.0)
    return _polygon(x, y, np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1))


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(_disc(x, y, 1.0), -_disc(x - 0.45, y, 0.8))


def _hourglass(x: Plane, y: Plane) -> Plane:
    half = [(-0.8, -1.0), (0.8, -1.0), (0.08, 0.0), (0.8, 1.0), (-0.8, 1.0), (-0.08, 0.0)]
    return _polygon(x, y, np.array(half))


def _bars(x: Plane, y: Plane) -> Plane:
    return _box(np.abs(x) - 0.68, y, 0.44, 1.0)


def _dots(x: Plane, y: Plane) -> Plane:
    angles = np.arange(3) * 2 * np.pi / 3
    discs = [_disc(x - 0.78 * np.sin(a), y + 0.78 * np.cos(a), 0.55) for a in angles]
    return np.minimum(np.minimum(discs[0], discs[1]), discs[2])


_SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "ring": _ring,
    "frame": _frame,
    "cross": _cross,
    "star": _star,
    "crescent": _crescent,
    "hourglass": _hourglass,
    "bars": _bars,
    "dots": _dots,
}
