"""A box of a JPEG has the same pixels as in the whole image, with and without libjpeg-turbo's own library."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ijepa.data.loading import decode as decode_module
from ijepa.data.loading import turbojpeg
from ijepa.data.loading.crop import Box
from ijepa.data.loading.decode import DecodeError, decode, decode_for
from ijepa.data.loading.turbojpeg import decode_box
from tests.helpers.images import encoded, jpeg, picture

KINDS = {
    "420": {"subsampling": 2},
    "422": {"subsampling": 1},
    "444": {"subsampling": 0},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_blocks": 2},
    "progressive": {"progressive": True},
}
SUBSAMPLINGS = {"420": 2, "422": 1, "444": 0}
PROPERTY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["library", "simplejpeg only"])
def decoder(request, monkeypatch):
    """The library, which the development install has, and no library."""
    if request.param == "library":
        assert turbojpeg.library() is not None
    else:
        monkeypatch.setattr(decode_module, "decode_box", lambda data, box: None)


def make_jpeg(kind: str, height: int = 75, width: int = 53) -> bytes:
    return encoded(picture(3, height, width), "JPEG", quality=85, **KINDS[kind])


def decoded_box(data: bytes, box: Box) -> np.ndarray:
    pixels, ((top, left, height, width),) = decode_for(data, lambda *_: [box])
    return pixels[top : top + height, left : left + width]


@PROPERTY
@given(
    st.sampled_from(["420", "422", "444", "411", "440"]),
    st.booleans(),
    st.tuples(*[st.integers(0, 10**6)] * 6),
)
def test_decode_for_returns_the_pixels_of_the_whole_image(decoder, sampling, progressive, draws):
    height, width = 1 + draws[0] % 90, 1 + draws[1] % 90
    top, left = draws[2] % height, draws[3] % width
    box = Box(top, left, 1 + draws[4] % (height - top), 1 + draws[5] % (width - left))
    image = picture(draws[0], height, width)
    if sampling in SUBSAMPLINGS:
        data = encoded(image, "JPEG", subsampling=SUBSAMPLINGS[sampling], progressive=progressive)
    else:  # Pillow does not write these
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), colorsubsampling=sampling)
    assert np.array_equal(decoded_box(data, box), decode(data)[top : top + box.height, left : left + box.width])


def test_decode_for_gray(decoder):
    data = io.BytesIO()
    Image.fromarray(picture(0, 60, 40)[..., 0]).save(data, "JPEG")
    assert np.array_equal(decoded_box(data.getvalue(), Box(7, 5, 17, 20)), decode(data.getvalue())[7:24, 5:25])


def test_decode_for_fill_bytes_and_comments_before_the_frame(decoder):
    data = encoded(picture(3, 75, 53), "JPEG", comment=b"\xff\xc0\xff\xda" * 9)
    filled = data[:2] + b"\xff\xff" + data[2:]
    for file in (data, filled):
        assert np.array_equal(decoded_box(file, Box(0, 0, 30, 53)), decode(data)[:30])


def test_decode_box_decodes_the_box_only():
    part = decode_box(make_jpeg("420", 300, 400), Box(100, 200, 50, 60))
    assert part is not None
    assert part[0].shape == (52, 70, 3)


def test_decode_box_leaves_progressive_files_to_simplejpeg():
    assert decode_box(make_jpeg("progressive"), Box(0, 0, 9, 9)) is None


def test_decode_for_keeps_no_tables_of_the_previous_file(decoder):
    whole = make_jpeg("420", 300, 400)
    at = whole.index(b"\xff\xdb")
    lacking = whole[:at] + whole[at + 2 + int.from_bytes(whole[at + 2 : at + 4], "big") :]
    assert decoded_box(whole, Box(0, 0, 9, 9)).any()
    with pytest.raises(DecodeError):
        decoded_box(lacking, Box(0, 0, 9, 9))


def test_library_skips_older_versions(monkeypatch):
    """Version 2, which many systems have, can be loaded but decodes no regions."""

    class Version2:
        def __init__(self, name):
            tried.append(name)

    tried = []
    monkeypatch.setattr(turbojpeg.ctypes, "CDLL", Version2)
    turbojpeg.library.cache_clear()
    try:
        assert turbojpeg.library() is None and len(tried) > 4
    finally:
        turbojpeg.library.cache_clear()


def test_decode_box_in_several_threads():
    data, box = make_jpeg("420", 200, 300), Box(20, 30, 100, 120)
    wanted = decoded_box(data, box)
    with ThreadPoolExecutor(4) as pool:
        for pixels in pool.map(lambda _: decoded_box(data, box), range(200)):
            assert np.array_equal(pixels, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_decode_for_refuses_truncated_files(decoder, kind, share):
    data = make_jpeg(kind)
    with pytest.raises(DecodeError):
        decoded_box(data[: int(len(data) * share)], Box(2, 2, 20, 20))


def test_decode_for_refuses_an_end_marker_within_the_box(decoder):
    """libjpeg reports it, but Pillow would fill the rest with gray."""
    data = make_jpeg("420")
    half = len(data) // 2
    for file in (data[:half] + b"\xff\xd9" + data[half + 2 :], data[:half] + b"\xff\xd9"):
        with pytest.raises(DecodeError, match="premature"):
            decoded_box(file, Box(0, 0, 60, 50))
        with pytest.raises(DecodeError, match="premature"):
            decode(file)


def test_decode_for_subsampling_that_simplejpeg_does_not_know(decoder):
    """Luma 1 x 4, as in a rotated 4:1:1 file: Pillow reads it."""
    data = bytearray(encoded(picture(3, 64, 64), "JPEG", subsampling=2))
    data[data.index(b"\xff\xc0") + 11] = 0x14
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(bytes(data))
    assert decode_for(bytes(data), lambda *_: [Box(0, 0, 9, 9)])[0].shape == (64, 64, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_decode_for_several_boxes(decoder, format):
    def choose(height, width):
        sizes.append((height, width))
        return wanted

    sizes = []
    wanted = [Box(12, 30, 10, 10), Box(20, 24, 12, 10), Box(15, 25, 5, 5)]
    data = jpeg(0, 80, 60) if format == "JPEG" else encoded(picture(0, 80, 60), "PNG")
    pixels, boxes = decode_for(data, choose)
    assert sizes == [(80, 60)]
    whole = decode(data)
    for (top, left, height, width), (row, column, _, _) in zip(boxes, wanted, strict=True):
        part = pixels[top : top + height, left : left + width]
        assert np.array_equal(part, whole[row : row + height, column : column + width])


@PROPERTY
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(1, 75),
)
def test_decode_for_damaged_files(decoder, kind, changes, rows):
    """Pixels or an error; and the right pixels if the whole file can be decoded."""
    data = bytearray(make_jpeg(kind))
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
