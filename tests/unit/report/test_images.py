import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.report.images import (
    Overlay,
    Picture,
    class_color,
    class_legend,
    class_map,
    heat_map,
    masked_picture,
    picture,
    to_bytes,
)


def pixels_of(shown: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.uri.partition(",")[2]))).convert("RGB"))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_picture_keeps_the_pixels() -> None:
    np.testing.assert_array_equal(pixels_of(picture(noise(7, 11), "")), noise(7, 11))


def test_picture_reduces_the_longer_side_and_never_enlarges() -> None:
    assert pixels_of(picture(noise(100, 50), "", max_side=20)).shape == (20, 10, 3)
    assert pixels_of(picture(noise(10, 5), "", max_side=20)).shape == (10, 5, 3)


def test_exact_picture_has_no_new_colors() -> None:
    labels = np.random.default_rng(1).integers(0, 3, (90, 90))
    painted = pixels_of(picture(class_map(labels, 3), "", max_side=20, exact=True))
    assert {tuple(c) for c in painted.reshape(-1, 3).tolist()} <= {class_color(i, 3) for i in range(3)}


def test_to_bytes_rounds_and_clips() -> None:
    assert to_bytes(np.array([[-1.0, 0.5, 2.0]])).tolist() == [[0, 128, 255]]


def test_heat_map_is_brighter_for_larger_cosines_and_gray_for_nan() -> None:
    painted = heat_map(np.array([[-0.5, 0.0, 0.5], [1.0, 2.0, np.nan]])).astype(int)
    brightness = painted.sum(2)
    assert brightness[0, 0] == brightness[0, 1] < brightness[0, 2] < brightness[1, 0] == brightness[1, 1]
    assert painted[1, 2].tolist() == [128, 128, 128]


def test_class_color_is_different_for_each_class() -> None:
    assert len({class_color(label, 150) for label in range(150)}) == 150


def test_labels_that_are_not_a_class_are_gray_and_not_scored() -> None:
    labels = np.array([[0, 1, 255]])
    assert class_map(labels, 2)[0].tolist() == [[38, 43, 51], [86, 180, 233], [200, 200, 200]]
    own = ((1, 2, 3), (4, 5, 6))
    assert class_map(labels, 2, own)[0].tolist() == [[1, 2, 3], [4, 5, 6], [200, 200, 200]]
    legend = class_legend([255, 1, 1], ("ground", "ring"), own)
    assert legend == [("rgb(4, 5, 6)", "ring"), ("rgb(200, 200, 200)", "not scored")]


def overlay_of(shown: Picture) -> Overlay:
    assert shown.overlay is not None
    return shown.overlay


@pytest.mark.parametrize("grid", [(6, 6), (6, 9)])
def test_masked_picture_draws_masks_at_their_place(grid: tuple[int, int]) -> None:
    patch, (rows, columns) = 8, grid
    masks = draw_masks(MaskRule(min_context=4), grid, 3, [0, 1, 2])
    for context, targets in zip(masks.context, masks.targets, strict=True):
        context, targets = context.reshape(grid), targets.reshape(-1, *grid)
        overlay = overlay_of(masked_picture(noise(rows * patch, columns * patch), context, targets, patch, "alt"))
        assert (overlay.width, overlay.height) == (columns * patch, rows * patch)
        for target, (x, y, width, height, _) in zip(targets, overlay.outlines, strict=True):
            inside = np.zeros_like(target)
            top, left = int(y // patch), int(x // patch)
            inside[top : int((y + height) // patch) + 1, left : int((x + width) // patch) + 1] = True
            np.testing.assert_array_equal(inside, target)
        for path, expected in ((overlay.context, context), (overlay.hidden, ~context)):
            covered = np.zeros(grid, dtype=int)
            for left, top, right, bottom in re.findall(r"M(\d+) (\d+)H(\d+)V(\d+)H\d+Z", path):
                covered[int(top) // patch : int(bottom) // patch, int(left) // patch : int(right) // patch] += 1
            np.testing.assert_array_equal(covered, expected)


def test_masked_picture_has_no_outline_for_an_empty_target() -> None:
    targets = np.zeros((4, 6, 6), dtype=bool)
    targets[1, 2:4, 1:3] = True
    assert len(overlay_of(masked_picture(noise(48, 48), ~targets.any(0), targets, 8, "alt")).outlines) == 1
