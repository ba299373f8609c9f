"""The first rows of a JPEG are those of the whole image, and a file that is cut short is found out."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ijepa.data.loading import turbojpeg
from ijepa.data.loading.crop import Box
from ijepa.data.loading.decode import DecodeError, decode, decode_for, image_size
from ijepa.data.loading.jpeg import decode_part
from tests.helpers.images import encoded, jpeg, picture

KINDS = {
    "420": {"subsampling": 2},
    "422": {"subsampling": 1},
    "444": {"subsampling": 0},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_blocks": 2},
    "progressive": {"progressive": True},
}


@pytest.fixture(params=["library", "simplejpeg alone"])
def either(request, monkeypatch):
    """Both ways to decode a part: by libjpeg-turbo's own library, which the development install has, and without."""
    if request.param == "library":
        assert turbojpeg.library() is not None
    else:
        monkeypatch.setattr(turbojpeg, "library", lambda: None)


SPARED = [kind for kind in KINDS if kind not in ("restarts", "progressive")]


def made(kind: str, height: int = 75, width: int = 53) -> bytes:
    return encoded(picture(3, height, width), "JPEG", quality=85, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows_is_the_beginning_of_the_image(either, kind):
    data = made(kind)
    whole = decode(data)
    assert whole.shape == (75, 53, 3)
    for rows in range(1, 76):
        part, row, column = decode_part(data, 75, 53, Box(0, 0, rows, 53))
        assert rows <= len(part) <= 75 and row == column == 0
        assert np.array_equal(part[:rows], whole[:rows]), rows


@pytest.mark.parametrize("kind", SPARED)
def test_rows_that_are_not_wanted_are_not_decoded(either, kind):
    assert len(decode_part(made(kind), 75, 53, Box(0, 0, 20, 53))[0]) < 75


def test_grey(either):
    data = io.BytesIO()
    Image.fromarray(picture(0, 60, 40)[..., 0]).save(data, "JPEG")
    part = decode_part(data.getvalue(), 60, 40, Box(0, 0, 17, 40))[0]
    assert np.array_equal(part[:17], decode(data.getvalue())[:17])


def test_bytes_and_comments_before_the_frame(either):
    data = encoded(picture(3, 75, 53), "JPEG", comment=b"\xff\xc0\xff\xda" * 9)
    filled = data[:2] + b"\xff\xff" + data[2:]  # fill bytes before a marker
    for file in (data, filled):
        part = decode_part(file, 75, 53, Box(0, 0, 30, 53))[0]
        assert np.array_equal(part[:30], decode(data)[:30]) and len(part) < 75


PILLOWS = {"420": 2, "422": 1, "444": 0}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["420", "422", "444", "411", "440"]),
    st.booleans(),
    st.tuples(*[st.integers(0, 10**6)] * 6),
)
def test_a_box_is_the_same_as_in_the_whole_image(either, sampling, progressive, draws):
    """Over image sizes from 1 to 90 pixels, and any box in them."""
    height, width = 1 + draws[0] % 90, 1 + draws[1] % 90
    top, left = draws[2] % height, draws[3] % width
    box = Box(top, left, 1 + draws[4] % (height - top), 1 + draws[5] % (width - left))
    image = picture(draws[0], height, width)
    if sampling in PILLOWS:
        data = encoded(image, "JPEG", subsampling=PILLOWS[sampling], progressive=progressive)
    else:  # of these Pillow makes none
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), colorsubsampling=sampling)
    pixels, row, column = decode_part(data, height, width, box)
    inside = pixels[top - row :, left - column :][: box.height, : box.width]
    assert np.array_equal(inside, decode(data)[top : top + box.height, left : left + box.width])


def test_the_library_decodes_the_box_alone():
    assert decode_part(made("420", 300, 400), 300, 400, Box(100, 200, 50, 60))[0].shape == (52, 70, 3)


def test_a_file_without_tables_does_not_get_those_of_the_last(either):
    """A decoder that is used again keeps them."""
    whole = made("420", 300, 400)
    at = whole.index(b"\xff\xdb")
    lacking = whole[:at] + whole[at + 2 + int.from_bytes(whole[at + 2 : at + 4], "big") :]
    assert decode_for(whole, lambda *_: [Box(0, 0, 9, 9)])[0].any()
    with pytest.raises(DecodeError):
        decode_for(lacking, lambda *_: [Box(0, 0, 9, 9)])


def test_older_libraries_are_passed_over(monkeypatch):
    """Version 2, which many systems have, opens but has no regions."""

    class Old:
        def __init__(self, name):
            tried.append(name)

    tried = []
    monkeypatch.setattr(turbojpeg.ctypes, "CDLL", Old)
    turbojpeg.library.cache_clear()
    try:
        assert turbojpeg.library() is None and len(tried) > 4
    finally:
        turbojpeg.library.cache_clear()


def test_threads_do_not_share_a_decoder():
    data, box = made("420", 200, 300), Box(20, 30, 100, 120)
    wanted = decode_part(data, 200, 300, box)[0]
    with ThreadPoolExecutor(4) as pool:
        for pixels, _, _ in pool.map(lambda _: decode_part(data, 200, 300, box), range(200)):
            assert np.array_equal(pixels, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_cut_short_below_the_box_or_in_it(either, kind, share):
    data = made(kind)
    with pytest.raises(DecodeError):
        decode_for(data[: int(len(data) * share)], lambda height, width: [Box(2, 2, 20, 20)])


def test_codes_that_end_within_the_box_are_no_picture(either):
    """An end of image in the middle: libjpeg complains, and Pillow would fill it up with grey."""
    data = made("420")
    broken = data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 + 2 :]
    cut = data[: len(data) // 2] + b"\xff\xd9"
    for file in (broken, cut):
        with pytest.raises(DecodeError, match="premature end"):
            decode_for(file, lambda *_: [Box(0, 0, 60, 50)])
        with pytest.raises(DecodeError, match="premature end"):
            decode(file)


@pytest.mark.parametrize("marker", [0xC0, 0xC4, 0xD3, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xFE, 0xFF])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stray_marker_below_the_box_is_taken_alike_with_and_without_the_library(monkeypatch, kind, marker):
    data, box = bytearray(made(kind, 300, 200)), Box(10, 10, 60, 100)
    place = len(data) * 9 // 10
    data[place : place + 2] = bytes((0xFF, marker))

    def outcome() -> np.ndarray | None:
        try:
            pixels, (inside,) = decode_for(bytes(data), lambda *_: [box])
        except DecodeError:
            return None
        return pixels[inside.top :, inside.left :][: box.height, : box.width]

    ours = outcome()
    monkeypatch.setattr(turbojpeg, "library", lambda: None)
    theirs = outcome()
    assert (ours is None) == (theirs is None)
    assert ours is None or np.array_equal(ours, theirs)
    if kind in SPARED:
        assert np.array_equal(ours, decode(made(kind, 300, 200))[10:70, 10:110])


@pytest.mark.parametrize("scans", range(1, 10))
def test_a_progressive_file_that_lacks_scans_is_the_same_with_and_without_the_library(monkeypatch, scans):
    """libjpeg smooths what is missing across blocks, so that more than the box counts."""
    data = made("progressive", 120, 150)
    starts = [found for found in range(len(data) - 1) if data[found : found + 2] == b"\xff\xda"]
    short = data[: starts[min(scans, len(starts) - 1)]] + b"\xff\xd9"
    ours, (inside,) = decode_for(short, lambda *_: [Box(20, 30, 50, 60)])
    monkeypatch.setattr(turbojpeg, "library", lambda: None)
    theirs, (other,) = decode_for(short, lambda *_: [Box(20, 30, 50, 60)])
    assert np.array_equal(ours[inside.top :, inside.left :][:50, :60], theirs[other.top :, other.left :][:50, :60])


def test_a_sampling_that_simplejpeg_cannot_name(either):
    """Luma 1 x 4, as a turned 4:1:1 has it: Pillow reads it."""
    data = bytearray(encoded(picture(3, 64, 64), "JPEG", subsampling=2))
    at = data.index(b"\xff\xc0")
    data[at + 11] = 0x14
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(bytes(data))
    assert image_size(bytes(data)) == (64, 64)
    assert decode_for(bytes(data), lambda *_: [Box(0, 0, 9, 9)])[0].shape == (64, 64, 3)


def test_boxes_are_chosen_by_the_size_and_all_of_them_are_there(either):
    seen = []

    def choose(height, width):
        seen.append((height, width))
        return wanted

    wanted = [Box(12, 30, 10, 10), Box(20, 24, 12, 10), Box(15, 25, 5, 5)]
    pixels, boxes = decode_for(jpeg(0, 80, 60), choose)
    assert seen == [(80, 60)] and len(boxes) == 3 and len(pixels) < 80
    whole = decode(jpeg(0, 80, 60))
    for (top, left, height, width), (row, column, _, _) in zip(boxes, wanted, strict=True):
        part = pixels[top : top + height, left : left + width]
        assert np.array_equal(part, whole[row : row + height, column : column + width])
    png = encoded(picture(0, 80, 60), "PNG")
    assert decode_for(png, choose)[0].shape == (80, 60, 3) and seen[1:] == [(80, 60)]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(1, 75),
)
def test_damage_gives_pixels_or_an_error(either, kind, changes, rows):
    """And where the whole file is in order, what is returned is the same."""
    data = bytearray(made(kind))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(bytes(data))
        whole = simplejpeg.decode_jpeg(bytes(data)) if height * width < 10**6 else None
    except (ValueError, KeyError):
        whole = None
    try:
        part, (box,) = decode_for(bytes(data), lambda height, width: [Box(0, 0, min(rows, height), min(50, width))])
    except DecodeError:
        assert whole is None
        return
    assert part.ndim == 3 and part.shape[2] == 3 and part.dtype == np.uint8
    if whole is not None:
        assert np.array_equal(part[: box.height, : box.width], whole[: box.height, : box.width])


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.tuples(st.integers(0, 10**5), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(1, 74),
)
def test_what_is_damaged_is_taken_or_not_whether_the_library_is_there_or_not(kind, changes, rows):
    data = bytearray(made(kind))
    for place, value in changes:
        data[place % len(data)] = value

    def outcome() -> np.ndarray | None:
        try:
            pixels, (box,) = decode_for(
                bytes(data), lambda height, width: [Box(0, 0, min(rows, height), min(40, width))]
            )
        except DecodeError:
            return None
        return pixels[box.top :, box.left :][: box.height, : box.width]

    ours = outcome()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(turbojpeg, "library", lambda: None)
        theirs = outcome()
    assert (ours is None) == (theirs is None)
    assert ours is None or np.array_equal(ours, theirs)
