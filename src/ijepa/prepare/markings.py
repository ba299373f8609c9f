"""The markings on the built-in shapes: each class has its own, as animals have theirs, with mean 0 and deviation 1.

A marking lightens and darkens an instance's own colour. Over the shape its mean is 0 and its deviation 1 for every
class, so that neither colour nor contrast tells which one it is; only its form does. It turns and grows with its
instance. Like the shapes, markings are evaluated once into a table.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from ijepa.prepare.shapes import CLASSES, EXTENT, RESOLUTION, TILT, Plane, distance_tables

WAVE = 0.36
"""Length of a marking's wave, in square roots of the shape's area: some four pixels in a scene of 64."""


@cache
def marking_tables() -> Plane:
    """Return (classes, RESOLUTION, RESOLUTION) brightness, laid out as the distance tables are."""
    axis = (np.arange(RESOLUTION) + 0.5) * (2 * EXTENT / RESOLUTION) - EXTENT
    y, x = np.meshgrid(axis, axis, indexing="ij")
    x, y = np.cos(TILT) * x + np.sin(TILT) * y, np.cos(TILT) * y - np.sin(TILT) * x
    tables = []
    for name, distance in zip(CLASSES, distance_tables(), strict=True):
        raw, inside = _MARKINGS[name](x, y), distance < 0
        tables.append(((raw - raw[inside].mean()) / raw[inside].std()).astype(np.float32))
    return np.stack(tables)


def _wave(x: Plane, share: float = 1.0) -> Plane:
    """A cosine of `share` waves a WAVE."""
    return np.cos(2 * np.pi / WAVE * share * x)


def _rings(x: Plane, y: Plane) -> Plane:
    return _wave(np.hypot(x, y))


def _checks(x: Plane, y: Plane) -> Plane:
    return np.sign(_wave(x, 0.8) * _wave(y, 0.8))


def _stripes(x: Plane, y: Plane) -> Plane:
    return _wave(x)


def _rays(x: Plane, y: Plane) -> Plane:
    return np.cos(8 * np.arctan2(y, x))


def _shades(x: Plane, y: Plane) -> Plane:
    return _wave(x, 0.5)


def _zigzags(x: Plane, y: Plane) -> Plane:
    return _wave(x + 0.24 * np.abs((3 * y) % 2 - 1))


def _edges(x: Plane, y: Plane) -> Plane:
    return np.sign(np.abs(np.abs(x) - 0.42) - 0.15)


def _spots(x: Plane, y: Plane) -> Plane:
    return np.where(_wave(x, 0.9) + _wave(y, 0.9) > 0.6, 1.0, -0.6)


_MARKINGS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "ring": _rings,
    "frame": _checks,
    "cross": _stripes,
    "star": _rays,
    "crescent": _shades,
    "hourglass": _zigzags,
    "bars": _edges,
    "dots": _spots,
}
