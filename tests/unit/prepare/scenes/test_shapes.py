"""The shapes are matched in area and edge, centered, and inside their tables."""

import numpy as np
import pytest

from ijepa.prepare.scenes import shapes

CELLS = 600
CELL = 2 * shapes.EXTENT / CELLS


def plane() -> tuple[np.ndarray, np.ndarray]:
    """Points on a turned grid, so that no straight edge runs along it and counting cells is fair."""
    axis = (np.arange(CELLS) + 0.5) * CELL - shapes.EXTENT
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x * np.cos(0.3) - y * np.sin(0.3), x * np.sin(0.3) + y * np.cos(0.3)


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_signed_distance_area_centroid_and_extent(name: str) -> None:
    x, y = plane()
    inside = shapes.signed_distance(name, x, y) < 0
    assert inside.sum() * CELL**2 == pytest.approx(1, abs=0.01)
    assert x[inside].mean() == pytest.approx(0, abs=0.01)
    assert y[inside].mean() == pytest.approx(0, abs=0.01)
    assert np.hypot(x, y)[inside].max() < shapes.EXTENT - 0.05


def test_signed_distance_edges_have_similar_lengths() -> None:
    # The band within h of the edge has area 2 h times its length, corners apart.
    x, y = plane()
    near = [np.abs(shapes.signed_distance(name, x, y)) < 0.01 for name in shapes.CLASSES]
    lengths = np.array([band.sum() for band in near]) * CELL**2 / 0.02
    assert lengths.min() > 5.9
    assert lengths.max() / lengths.min() < 1.05


def test_signed_distance_changes_no_faster_than_position() -> None:
    # The gradient of a distance is at most 1.
    x, y = plane()
    for name in shapes.CLASSES:
        distance = shapes.signed_distance(name, x, y)
        assert max(np.abs(np.diff(distance, axis=axis)).max() for axis in (0, 1)) < 1.0001 * CELL, name


def test_distance_tables_equal_the_tilted_formula() -> None:
    tables = shapes.distance_tables()
    cell = 2 * shapes.EXTENT / shapes.RESOLUTION
    turn = np.array([[np.cos(shapes.TILT), np.sin(shapes.TILT)], [-np.sin(shapes.TILT), np.cos(shapes.TILT)]])
    for label, name in enumerate(shapes.CLASSES):
        for row, column in ((0, 0), (96, 96), (50, 120), (191, 3)):
            place = (np.array([column, row]) + 0.5) * cell - shapes.EXTENT
            x, y = turn @ place
            plain = shapes.signed_distance(name, np.array([x]), np.array([y]))[0]
            assert tables[label, row, column] == pytest.approx(plain, abs=1e-5)
