"""The first rows of a JPEG are those of the whole image, and a file that is cut short is found out."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ijepa.data import turbojpeg
from ijepa.data.crop import Box
from ijepa.data.decode import DecodeError, decode, decode_for
from ijepa.data.jpeg import decode_part, decode_rows
from tests.data.making import encoded, jpeg, picture

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
    assert decode_part(made("420", 300, 400), 300, 400, Box(100, 200, 50, 60))[0].shape == (54, 70, 3)


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


def test_codes_that_end_within_the_box_are_not_taken_for_the_rest(either):
    """An end of image in the middle is libjpeg's own complaint, and then Pillow has a look, as for the whole image."""
    data = made("420")
    broken = data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 + 2 :]
    with pytest.raises(ValueError, match="premature end"):
        decode_part(broken, 75, 53, Box(0, 0, 60, 50))
    assert np.array_equal(decode_for(broken, lambda *_: [Box(0, 0, 60, 50)])[0], decode(broken))


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
    except ValueError:
        whole = None
    try:
        part, (box,) = decode_for(bytes(data), lambda height, width: [Box(0, 0, min(rows, height), min(50, width))])
    except DecodeError:
        assert whole is None
        return
    assert part.ndim == 3 and part.shape[2] == 3 and part.dtype == np.uint8
    if whole is not None:
        assert np.array_equal(part[: box.height, : box.width], whole[: box.height, : box.width])
