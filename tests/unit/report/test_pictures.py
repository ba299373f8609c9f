import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.report.pictures import class_colour, class_legend, class_map, colours, hit, masked, picture, png


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_keeps_pixels() -> None:
    np.testing.assert_array_equal(pixels_of(png(noise(7, 11))), noise(7, 11))


def test_png_reduces_the_longer_side_and_never_enlarges() -> None:
    assert pixels_of(png(noise(100, 50), 20)).shape == (20, 10, 3)
    assert pixels_of(png(noise(10, 5), 20)).shape == (10, 5, 3)


def test_reduced_maps_have_no_new_colours() -> None:
    labels = np.random.default_rng(1).integers(0, 3, (90, 90))
    painted = pixels_of(png(class_map(labels, 3), 20, exact=True))
    assert {tuple(c) for c in painted.reshape(-1, 3).tolist()} <= {class_colour(i) for i in range(3)}


def test_words_of_a_picture_are_escaped() -> None:
    assert 'alt="a &lt;b&gt; &quot;c&quot;"' in picture(noise(2, 2), 'a <b> "c"')


def test_colours_are_rounded_and_clipped() -> None:
    assert colours(np.array([[-1.0, 0.5, 2.0]])).tolist() == [[0, 128, 255]]


def test_classes_have_colours_of_their_own() -> None:
    assert len({class_colour(label) for label in range(150)}) == 150


def test_labels_beyond_the_classes_are_grey_and_named_so() -> None:
    painted = class_map(np.array([[0, 1, 255]]), 2)
    assert painted[0, 2].tolist() == [200, 200, 200] and painted[0, 1].tolist() == list(class_colour(1))
    own = ((1, 2, 3), (4, 5, 6))
    assert class_map(np.array([[0, 1, 255]]), 2, own)[0].tolist() == [[1, 2, 3], [4, 5, 6], [200, 200, 200]]
    assert "rgb(4, 5, 6)" in class_legend([1], ("ground", "a<b"), own)
    words = re.findall(r"</i>([^<]*)<", class_legend([255, 1, 1], ("ground", "a<b")))
    assert words == ["a&lt;b", "not scored"]


def boxes(svg: str) -> list[tuple[float, ...]]:
    found = re.findall(r'<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)" fill="none"', svg)
    return [tuple(map(float, box)) for box in found]


@pytest.mark.parametrize("grid", [(6, 6), (6, 9)])
def test_masks_are_drawn_where_they_are(grid: tuple[int, int]) -> None:
    patch, (rows, columns) = 8, grid
    masks = draw_masks(MaskRule(min_context=4), grid, 3, [0, 1, 2])
    for context, targets in zip(masks.context, masks.targets, strict=True):
        context, targets = context.reshape(grid), targets.reshape(-1, *grid)
        svg = masked(noise(rows * patch, columns * patch), context, targets, patch, "words")
        assert f'viewBox="0 0 {columns * patch} {rows * patch}"' in svg
        for target, (x, y, width, height) in zip(targets, boxes(svg), strict=True):
            inside = np.zeros_like(target)
            top, left = int(y // patch), int(x // patch)
            inside[top : int((y + height) // patch) + 1, left : int((x + width) // patch) + 1] = True
            np.testing.assert_array_equal(inside, target)
        for kind, expected in (("context", context), ("hidden", ~context)):
            (path,) = re.findall(rf'<path class="{kind}" d="(.*?)"', svg)
            covered = np.zeros(grid, dtype=int)
            for left, top, right, bottom in re.findall(r"M(\d+) (\d+)H(\d+)V(\d+)H\d+Z", path):
                covered[int(top) // patch : int(bottom) // patch, int(left) // patch : int(right) // patch] += 1
            np.testing.assert_array_equal(covered, expected)


def test_targets_given_up_have_no_outline() -> None:
    targets = np.zeros((4, 6, 6), dtype=bool)
    targets[1, 2:4, 1:3] = True
    assert len(boxes(masked(noise(48, 48), ~targets.any(0), targets, 8, "words"))) == 1


def test_hits_say_right_and_wrong_by_sign_too() -> None:
    assert "✓" in hit(noise(4, 4), True, "") and "✗" in hit(noise(4, 4), False, "")
    assert not {"✓", "✗"} & set(hit(noise(4, 4), None, ""))
