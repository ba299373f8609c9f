"""The first rows of a JPEG are those of the whole image, and a file that is cut short is found out."""

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ijepa.data.crop import Box
from ijepa.data.decode import DecodeError, decode, decode_for
from ijepa.data.jpeg import decode_rows
from tests.data.making import encoded, jpeg, picture

KINDS = {
    "420": {"subsampling": 2},
    "422": {"subsampling": 1},
    "444": {"subsampling": 0},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_blocks": 2},
    "progressive": {"progressive": True},
}
SPARED = [kind for kind in KINDS if kind not in ("restarts", "progressive")]


def made(kind: str, height: int = 75, width: int = 53) -> bytes:
    return encoded(picture(3, height, width), "JPEG", quality=85, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows_is_the_beginning_of_the_image(kind):
    data = made(kind)
    whole = decode(data)
    assert whole.shape == (75, 53, 3)
    for rows in range(1, 76):
        part = decode_rows(data, 75, 53, rows)
        assert rows <= len(part) <= 75
        assert np.array_equal(part[:rows], whole[:rows]), rows


@pytest.mark.parametrize("kind", SPARED)
def test_rows_that_are_not_wanted_are_not_decoded(kind):
    assert len(decode_rows(made(kind), 75, 53, 20)) < 75


def test_grey():
    data = io.BytesIO()
    Image.fromarray(picture(0, 60, 40)[..., 0]).save(data, "JPEG")
    assert np.array_equal(decode_rows(data.getvalue(), 60, 40, 17)[:17], decode(data.getvalue())[:17])


def test_bytes_and_comments_before_the_frame():
    data = encoded(picture(3, 75, 53), "JPEG", comment=b"\xff\xc0\xff\xda" * 9)
    filled = data[:2] + b"\xff\xff" + data[2:]  # fill bytes before a marker
    for file in (data, filled):
        assert np.array_equal(decode_rows(file, 75, 53, 30)[:30], decode(data)[:30])
        assert len(decode_rows(file, 75, 53, 30)) < 75


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_cut_short_below_the_box_or_in_it(kind, share):
    data = made(kind)
    with pytest.raises(DecodeError):
        decode_for(data[: int(len(data) * share)], lambda height, width: [Box(2, 2, 20, 20)])


def test_codes_that_end_within_the_box_are_not_taken_for_the_rest(monkeypatch):
    """An end of image in the middle is libjpeg's own complaint, and then Pillow has a look, as for the whole image."""
    data = made("420")
    broken = data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 + 2 :]
    with pytest.raises(ValueError, match="premature end"):
        decode_rows(broken, 75, 53, 60)
    assert np.array_equal(decode_for(broken, lambda *_: [Box(0, 0, 60, 50)])[0], decode(broken))


def test_boxes_are_chosen_by_the_size_and_the_lowest_counts():
    seen = []

    def choose(height, width):
        seen.append((height, width))
        return [Box(0, 0, 10, 10), Box(20, 0, 12, 10), Box(5, 5, 5, 5)]

    pixels, boxes = decode_for(jpeg(0, 80, 60), choose)
    assert seen == [(80, 60)] and len(boxes) == 3
    assert 32 <= len(pixels) < 80
    assert np.array_equal(pixels[:32], decode(jpeg(0, 80, 60))[:32])
    png = encoded(picture(0, 80, 60), "PNG")
    assert decode_for(png, choose)[0].shape == (80, 60, 3) and seen[1:] == [(80, 60)]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(1, 75),
)
def test_damage_gives_pixels_or_an_error(kind, changes, rows):
    """And where the whole file is in order, what is returned is the same."""
    data = bytearray(made(kind))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(bytes(data))
        whole = simplejpeg.decode_jpeg(bytes(data)) if height * width < 10**6 else None
    except ValueError:
        whole = None
    try:
        part, _ = decode_for(bytes(data), lambda height, width: [Box(0, 0, min(rows, height), width)])
    except DecodeError:
        assert whole is None
        return
    assert part.ndim == 3 and part.shape[2] == 3 and part.dtype == np.uint8
    if whole is not None:
        assert np.array_equal(part[: min(rows, height)], whole[: min(rows, height)])
