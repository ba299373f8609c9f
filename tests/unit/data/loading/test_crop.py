import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ijepa.data.loading.crop import WORDS, Box, center_crop_box, clamped_crop_box, crop_resize, random_resized_crop_box
from ijepa.utils.random import Stream, random_bits, uniform
from tests.helpers.images import picture
from tests.reference import crop as reference

RATIO = (3 / 4, 4 / 3)


def boxes(count: int, height: int, width: int, scale=(0.3, 1.0), ratio=RATIO) -> np.ndarray:
    draws = random_bits(0, Stream.CROP, np.arange(count), WORDS)
    return np.array([random_resized_crop_box(draw, height, width, scale, ratio) for draw in draws])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(0, 10**9),
    st.sampled_from([(0.3, 1.0), (0.05, 0.2), (1.0, 1.0), (0.9, 1.0)]),
    st.sampled_from([RATIO, (1.0, 1.0), (0.2, 5.0)]),
)
def test_random_resized_crop_box_agrees_with_reference(height, width, position, scale, ratio):
    draw = random_bits(7, Stream.CROP, position, WORDS)[0]
    box = random_resized_crop_box(draw, height, width, scale, ratio)
    expected = reference.random_resized_crop(uniform(draw).reshape(10, 4).tolist(), height, width, scale, ratio)
    assert np.abs(np.subtract(box, expected)).max() <= 1  # a side of n + .5 may be rounded in either direction
    assert box.height >= 1 and box.width >= 1 and box.top >= 0 and box.left >= 0
    assert box.top + box.height <= height and box.left + box.width <= width


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(0, 10**9),
    st.sampled_from([(0.08, 1.0), (0.05, 0.2), (1.0, 1.0)]),
)
def test_clamped_crop_box_agrees_with_reference(height, width, position, scale):
    draw = random_bits(7, Stream.CROP, position, WORDS)[0]
    box = clamped_crop_box(draw, height, width, scale, RATIO)
    expected = reference.clamped_crop(uniform(draw)[:4].tolist(), height, width, scale, RATIO)
    assert np.abs(np.subtract(box, expected)).max() <= 1  # a side of n + .5 may be rounded in either direction
    assert box.height >= 1 and box.width >= 1 and box.top >= 0 and box.left >= 0
    assert box.top + box.height <= height and box.left + box.width <= width


def test_clamped_crop_box_is_larger_on_average():
    draws = random_bits(0, Stream.CROP, np.arange(4000), WORDS)
    area = {}
    for rule in (random_resized_crop_box, clamped_crop_box):
        found = np.array([rule(draw, 375, 500, (0.08, 1.0), RATIO) for draw in draws])
        area[rule] = (found[:, 2] * found[:, 3]).mean() / (375 * 500)
    assert area[random_resized_crop_box] == pytest.approx(0.43, abs=0.01)
    assert area[clamped_crop_box] == pytest.approx(0.52, abs=0.01)


def test_random_resized_crop_box_distribution():
    found = boxes(4000, 600, 600, scale=(0.1, 0.5))
    area = found[:, 2] * found[:, 3] / 600**2
    aspect = np.log(found[:, 3] / found[:, 2])
    assert area.min() > 0.099 and area.max() < 0.501
    assert abs(area.mean() - 0.3) < 0.01 and abs(np.quantile(area, 0.25) - 0.2) < 0.015
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.01
    assert abs(aspect.mean()) < 0.015 and abs(aspect.std() - 2 * np.log(4 / 3) / 12**0.5) < 0.01
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.05
    for side in (0, 1):
        slack = found[:, side] / (600 - found[:, side + 2])
        assert abs(slack.mean() - 0.5) < 0.02 and slack.min() < 0.01 and slack.max() > 0.99


def test_random_resized_crop_box_reaches_all_places():
    found = boxes(2000, 10, 10, scale=(0.64, 0.64), ratio=(1.0, 1.0))
    assert set(found[:, 0].tolist()) == {0, 1, 2} == set(found[:, 1].tolist())


def test_random_resized_crop_box_of_narrow_images_is_central():
    assert random_resized_crop_box(random_bits(0, Stream.CROP, 0, WORDS)[0], 1000, 40, (0.9, 1), RATIO) == (
        473,
        0,
        53,
        40,
    )
    assert random_resized_crop_box(random_bits(0, Stream.CROP, 0, WORDS)[0], 40, 1000, (0.9, 1), RATIO) == (
        0,
        473,
        40,
        53,
    )


def test_center_crop_box():
    assert center_crop_box(375, 500, (224, 224)) == (23, 86, 328, 328)
    assert center_crop_box(500, 375, (224, 224), 1.0) == (62, 0, 375, 375)
    assert center_crop_box(100, 100, (32, 64), 1.0) == (25, 0, 50, 100)
    assert center_crop_box(1, 1, (224, 224)) == (0, 0, 1, 1)


@pytest.mark.parametrize("size", [(64, 48), (16, 16), (100, 90), (7, 120)])
@pytest.mark.parametrize("box", [Box(0, 0, 123, 157), Box(10, 20, 100, 90), Box(120, 150, 3, 7), Box(5, 5, 1, 1)])
def test_crop_resize_agrees_with_reference_and_pillow(box, size):
    image = picture(0, 123, 157)
    pixels = crop_resize(image, box, size)
    assert pixels.shape == (3, *size) and pixels.is_contiguous()
    found = pixels.permute(1, 2, 0).numpy().astype(float)
    part = image[box.top : box.top + box.height, box.left : box.left + box.width]
    assert np.abs(found - reference.resize(part, size)).max() < 1.6  # fixed-point weights, rounded after each axis
    assert np.abs(found - reference.resize(part, size)).mean() < 0.4
    pillow = np.array(Image.fromarray(part).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.abs(found - pillow).max() <= 1


@pytest.mark.parametrize("size", [(64, 48), (16, 16), (224, 224), (7, 120)])
@pytest.mark.parametrize("noise", [False, True])
def test_crop_resize_bicubic_agrees_with_pillow(size, noise):
    """With noise, every second pixel overshoots. It must be clamped after each axis, as in Pillow."""
    image = picture(0, 123, 157)
    if noise:
        image = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    box = Box(10, 20, 100, 90)
    part = Image.fromarray(image[10:110, 20:110])
    found = crop_resize(image, box, size, "bicubic").permute(1, 2, 0).numpy().astype(float)
    away = np.abs(found - np.array(part.resize(size[::-1], Image.Resampling.BICUBIC)))
    assert away.max() <= 2 and away.mean() < 0.3
    assert np.abs(found - crop_resize(image, box, size).permute(1, 2, 0).numpy()).max() > 2, "another filter"


def test_crop_resize_copies_a_box_of_the_target_size():
    image = picture(0)
    pixels = crop_resize(image, Box(3, 4, 20, 30), (20, 30))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), image[3:23, 4:34])
    pixels.zero_()
    assert image[3:23, 4:34].any()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "box", [Box(3, 4, 33, 41), Box(0, 0, 60, 80), Box(10, 0, 20, 80), Box(7, 9, 20, 24), Box(0, 0, 1, 1)]
)
def test_crop_resize_result_does_not_depend_on_the_output_memory(box, interpolation):
    image, size = picture(0, 60, 80), (20, 24)
    wanted = crop_resize(image, box, size, interpolation)
    for format in (torch.contiguous_format, torch.channels_last):
        batch = torch.zeros(3, 3, *size, dtype=torch.uint8).contiguous(memory_format=format)
        assert crop_resize(image, box, size, interpolation, out=batch[1].numpy()).equal(wanted)
        assert batch[1].equal(wanted) and not batch[0].any() and not batch[2].any()


def test_crop_resize_reads_nothing_outside_the_box():
    image = picture(0)
    other = image.copy()
    other[:10], other[30:], other[:, :12], other[:, 40:] = 0, 255, 255, 0
    box = Box(10, 12, 20, 28)
    assert crop_resize(image, box, (9, 11)).equal(crop_resize(other, box, (9, 11)))
