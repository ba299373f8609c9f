import numpy as np
import pytest

from ijepa.evaluation.metrics.region_contour import contour, region
from tests.reference.videos import contour_f


def blob(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(3):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, height), x : x + rng.integers(1, width)] ^= True
    return mask


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tolerance", [0.008, 0.1])
def test_contour_agrees_with_a_comparison_of_all_pairs_of_pixels(seed: int, tolerance: float) -> None:
    ours, theirs = blob(17, 23, seed), blob(17, 23, seed + 100)
    assert contour(ours, theirs, tolerance) == pytest.approx(contour_f(ours, theirs, tolerance), abs=1e-12)
    assert contour(ours, ours) == region(ours, ours) == 1


def test_region_and_contour_of_empty_masks() -> None:
    empty, some = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    some[2:5, 3:6] = True
    assert region(empty, empty) == contour(empty, empty) == 1
    assert region(empty, some) == contour(empty, some) == contour(some, empty) == 0
    other = np.zeros((8, 8), bool)
    other[2:5, 4:7] = True
    assert region(other, some) == 0.5
