import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ijepa.data.loading import decode as module
from ijepa.data.loading.decode import DecodeError, decode, decode_mask
from tests.helpers.images import encoded, jpeg, picture


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def png(header: bytes, rows: bytes = b"") -> bytes:
    """Return a PNG with the given header fields and unfiltered rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "options",
    [{"quality": 90}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}],
)
def test_decode_jpeg_equals_pillow(options):
    data = encoded(picture(1, 61, 83), **options)
    assert np.array_equal(decode(data), by_pillow(data))


def test_decode_jpeg_does_not_need_pillow(monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    assert decode(jpeg(0, 30, 50)).shape == (30, 50, 3)


def test_decode_gray_jpeg():
    data = encoded(Image.fromarray(picture(2)).convert("L"))
    pixels = decode(data)
    assert np.array_equal(pixels, by_pillow(data))
    assert (pixels == pixels[..., :1]).all()


def test_decode_cmyk_jpeg():
    data = encoded(Image.fromarray(picture(3)).convert("CMYK"), quality=95)
    assert np.array_equal(decode(data), by_pillow(data))
    assert np.abs(decode(data).astype(int) - picture(3)).mean() < 8


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_decode_lossless_formats(format):
    assert np.array_equal(decode(encoded(picture(4), format, lossless=True)), picture(4))


def test_decode_drops_alpha():
    image = np.dstack([picture(5), np.zeros((40, 52), np.uint8)])
    assert np.array_equal(decode(encoded(image, "PNG")), picture(5))
    gray = Image.fromarray(image).convert("LA")
    assert np.array_equal(decode(encoded(gray, "PNG"))[..., 0], np.array(gray)[..., 0])


def test_decode_palette_with_transparency():
    image = Image.fromarray(picture(6)).quantize(16)
    data = encoded(image, "PNG", transparency=3)
    assert np.array_equal(decode(data), np.array(image.convert("RGB")))


def test_decode_16_bit_gray():
    values = np.array([[0, 128, 129, 257, 32767, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    pixels = decode(encoded(values, "PNG"))
    assert pixels[0, :, 1].tolist() == np.rint(values[0] / 257).astype(int).tolist()
    assert pixels.shape == (1, 9, 3)


def test_decode_16_bit_color():
    rows = b"\0" + struct.pack(">6H", 0, 65535, 257 * 100, 257 * 7, 257 * 8, 257 * 9)
    assert decode(png(struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0), rows)).tolist() == [[[0, 255, 100], [7, 8, 9]]]


def test_decode_bilevel():
    image = Image.fromarray(picture(7)).convert("1")
    assert np.array_equal(decode(encoded(image, "PNG")), np.array(image.convert("RGB")))


def test_decode_ignores_exif_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode(encoded(picture(8), exif=exif)).shape == (40, 52, 3)
    assert decode(encoded(picture(8), "PNG", exif=exif)).shape == (40, 52, 3)


def test_decode_first_frame_of_an_animation():
    frames = [Image.fromarray(picture(i)).quantize(32) for i in (1, 2)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(data), by_pillow(data))


def test_decode_ignores_bytes_after_a_jpeg():
    assert np.array_equal(decode(jpeg(9) + b"\0" * 100), decode(jpeg(9)))


@pytest.mark.parametrize("make", [jpeg, lambda n: encoded(picture(n), "PNG"), lambda n: encoded(picture(n), "WEBP")])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_decode_refuses_truncated_files(make, share):
    data = make(1)
    with pytest.raises(DecodeError):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data", [b"", b"hello, world\n" * 50, b"\xff\xd8\xff", b"\0" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_decode_refuses_files_that_are_not_images(data):
    with pytest.raises(DecodeError) as error:
        decode(data)
    assert str(error.value) and "\n" not in str(error.value)


def _huge_jpeg() -> bytes:
    data = bytearray(jpeg(0))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">2H", 30000, 30000)
    return bytes(data)


@pytest.mark.parametrize(
    "data", [_huge_jpeg(), png(struct.pack(">2I5B", 30000, 30000, 8, 2, 0, 0, 0))], ids=["jpeg", "png"]
)
def test_decode_refuses_huge_images_by_their_header(data, monkeypatch):
    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(DecodeError, match=r"120 megapixels"):
        decode(data)


def test_decode_does_not_use_pillows_size_limit(recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 52 - 1)
    data = encoded(picture(0), "PNG")
    assert decode(data).shape == (40, 52, 3)
    assert not recwarn.list
    monkeypatch.setattr(module, "MAX_PIXELS", 40 * 52 - 1)
    with pytest.raises(DecodeError, match="52 x 40"):
        decode(data)


_MEASURED = """
import sys
from pathlib import Path
from ijepa.data.loading.decode import decode

def memory(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024

decode(Path(sys.argv[1]).read_bytes())  # loads libraries
for name in sys.argv[2:]:
    data = Path(name).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS:")
    pixels = decode(data)
    print((memory("VmHWM:") - before) / (pixels.shape[0] * pixels.shape[1]))
    del pixels
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_decode_memory_is_bounded(tmp_path):
    side = 1500
    image = Image.fromarray(np.kron(picture(0, side // 25, side // 25), np.ones((25, 25, 1), np.uint8)))
    wide = np.asarray(image)[..., 0].astype(np.uint16) * 257
    files = {
        "jpeg": encoded(image),
        "progressive": encoded(image, progressive=True, subsampling=0),
        "cmyk": encoded(image.convert("CMYK"), progressive=True),
        "alpha": encoded(image.convert("RGBA"), "PNG", compress_level=1),
        "wide": encoded(wide, "PNG", compress_level=1),
        "webp": encoded(image, "WEBP", method=0),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "small").write_bytes(encoded(picture(0), "PNG"))
    paths = [str(tmp_path / name) for name in ("small", *files)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory is returned, so that it counts again
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *paths], capture_output=True, text=True, check=True, env=environment
    )
    measured = dict(zip(files, map(float, done.stdout.split()), strict=True))
    assert 2.9 < measured["jpeg"] < 5
    assert measured["wide"] < 9 and measured["alpha"] < 10
    assert max(measured.values()) < module.BYTES_A_PIXEL, measured


def test_decode_converts_large_images_in_bands(monkeypatch):
    images = [
        encoded(np.arange(52 * 40, dtype=np.uint16).reshape(40, 52) * 31, "PNG"),
        encoded(Image.fromarray(picture(6)).quantize(16), "PNG", transparency=3),
        encoded(picture(4), "WEBP", lossless=True),
    ]
    whole = [decode(data) for data in images]
    monkeypatch.setattr(module, "_BAND", 52 * 7)  # the last band has five rows
    assert all(np.array_equal(decode(data), pixels) for data, pixels in zip(images, whole, strict=True))


_GOOD = [jpeg(0, 16, 24), encoded(picture(0, 16, 24), "PNG"), encoded(picture(0, 16, 24), "WEBP")]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(_GOOD), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4))
def test_decode_damaged_bytes(good, changes):
    data = bytearray(good)
    for place, value in changes:
        data[place % len(data)] = value
    try:
        pixels = decode(bytes(data))
    except DecodeError:
        return
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8


def test_decode_mask():
    classes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(decode_mask(encoded(classes, "PNG")), classes)
    palette = Image.fromarray(classes, "P")
    palette.putpalette([value for i in range(12) for value in (i * 20, 0, 255 - i)])
    assert np.array_equal(decode_mask(encoded(palette, "PNG")), classes)
    wide = classes.astype(np.uint16) * 1000
    assert np.array_equal(decode_mask(encoded(wide, "PNG")), wide)
    assert decode_mask(encoded(Image.fromarray(classes > 3), "PNG")).max() == 1
    with pytest.raises(DecodeError, match="RGB"):
        decode_mask(encoded(picture(0), "PNG"))
    with pytest.raises(DecodeError):
        decode_mask(encoded(classes, "PNG")[:-30])
