"""Decode image files to pixels, exactly, and refuse broken files before they take memory.

The format is read from the bytes, never from the suffix of a file. libjpeg-turbo decodes JPEGs (through simplejpeg,
with the exact integer DCT and smooth chroma upsampling: the fast variants save 2 % of the time and lose 14 dB). Pillow
decodes everything else, and the JPEGs that simplejpeg refuses (CMYK, stray bytes that harm nothing). EXIF rotation is
ignored, as is usual in the field; alpha is dropped; an animation gives its first frame.

A file that is truncated, or whose codes end too early, is a `DecodeError` and never a picture with a gray half. Damage
that leaves the right number of codes is not detected, as in every decoder.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from ijepa.data.loading.crop import Box, hull
from ijepa.data.loading.turbojpeg import decode_box

Pixels = npt.NDArray[np.uint8]
MaskColors = Literal["refuse", "accept", "only"]
"""RGB masks are refused, accepted next to index masks, or all masks are read as RGB."""

MAX_PIXELS = 120_000_000
"""Larger images are refused after reading the header. A worker needs at most `BYTES_A_PIXEL` times this: 2.2 GB."""

BYTES_A_PIXEL = 18
"""Upper bound of the memory for decoding, result included: 3 for a plain JPEG, 8 for PNG, 17 for WebP."""

FORMATS = ("PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF", "PPM")
"""Formats that Pillow may open. Its full list contains formats that start other programs."""

_ENDS_EARLY = "premature end of data segment"
"""libjpeg's message if the codes end before the picture does. Pillow would fill the rest with gray."""
_BAND = 2**18
"""Number of pixels that are converted at a time."""
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_OBJECT_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
"""Pillow's messages contain the repr of a stream, which differs between processes."""


class DecodeError(ValueError):
    """These bytes are not an image that can be read completely; `str()` gives the reason in one line."""


def decode(data: bytes) -> Pixels:
    """Return the image as (H, W, 3) uint8, sRGB as stored.

    Raises:
        DecodeError: not an image, truncated, or more than `MAX_PIXELS`.
    """
    return decode_for(data, lambda height, width: [Box(0, 0, height, width)])[0]


def decode_for(data: bytes, choose: Callable[[int, int], Sequence[Box]]) -> tuple[Pixels, Sequence[Box]]:
    """Decode the part of an image that contains the boxes `choose(height, width)`.

    Returns:
        Pixels as from `decode`, possibly without the parts outside the boxes, and the boxes within these pixels.

    Raises:
        DecodeError: as `decode`; but damage below the boxes may not be detected, except in a truncated file.
    """
    if data.startswith(_JPEG):
        decoded = _decode_jpeg(data, choose)
        if decoded is not None:
            return decoded
    with _open(data) as image:
        _check_size(image.height, image.width)
        boxes = choose(image.height, image.width)
        try:
            return _to_rgb(image), boxes
        except Exception as error:  # Pillow's decoders raise nearly any type on broken bytes
            raise DecodeError(_one_line(error)) from error


def decode_mask(data: bytes, colors: MaskColors = "refuse") -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Return an index mask as (H, W): palette indices or gray values, uint8, or uint16 for a 16-bit file.

    RGB files that `colors` permits are (H, W, 3) uint8. With "only", files with a palette are converted to RGB too.

    Raises:
        DecodeError: as `decode`, and for colors that are not permitted.
    """
    with _open(data) as image:
        _check_size(image.height, image.width)
        mode = image.mode
        rgb = colors == "only" or (colors == "accept" and mode in ("RGB", "RGBA"))
        try:
            values = np.asarray(image.convert("RGB") if rgb else image)
        except Exception as error:  # as in `decode_for`
            raise DecodeError(_one_line(error)) from error
    if rgb:
        return values
    if mode in ("L", "P", "1"):
        return values.astype(np.uint8)
    if mode.startswith("I") and values.size and values.min() >= 0 and values.max() <= 0xFFFF:
        return values.astype(np.uint16)
    raise DecodeError(f"a mask needs one class index per pixel, but this file has mode {mode}")


def _decode_jpeg(data: bytes, choose: Callable[[int, int], Sequence[Box]]) -> tuple[Pixels, Sequence[Box]] | None:
    """Return the result of `decode_for`, or None if Pillow should try."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        if colorspace not in ("YCbCr", "Gray", "RGB"):  # CMYK: simplejpeg does not convert it to RGB
            return None
        boxes = choose(height, width)
        box, part = hull(boxes), None
        # A region decode stops at the last row of the box and would not notice that the rest of a file is missing.
        if (box.height, box.width) != (height, width) and data.rstrip(b"\0").endswith(_JPEG_END):
            part = decode_box(data, box)
        pixels, top, left = part or (simplejpeg.decode_jpeg(data, colorspace="RGB"), 0, 0)
        return pixels, [Box(box.top - top, box.left - left, box.height, box.width) for box in boxes]
    except DecodeError:
        raise
    except (ValueError, KeyError) as error:  # KeyError: a chroma subsampling that simplejpeg does not know
        # Pillow accepts harmless damage that simplejpeg reports, but it would also fill a missing part with gray.
        if _ENDS_EARLY in str(error):
            raise DecodeError(_one_line(error)) from error
        return None


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DecodeError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images; the limit here is MAX_PIXELS, which the callers check.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # raised at twice Pillow's limit, which is above MAX_PIXELS
        raise DecodeError(f"more than {MAX_PIXELS // 10**6} megapixels") from error
    except Exception as error:  # as in `decode_for`
        raise DecodeError(_one_line(error)) from error


def _to_rgb(image: Image.Image) -> Pixels:
    """Convert a band of rows at a time, because a copy of the whole image would double the memory."""
    if image.mode == "F":
        raise DecodeError("floating-point pixels, whose range is unknown")
    image.load()
    pixels: Pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        band = image if rows >= image.height else image.crop((0, top, image.width, bottom))
        is_16_bit = image.mode.startswith("I")  # "I;16", "I;16B", and "I" for 16-bit files in older Pillow
        pixels[top:bottom] = _to_8_bit(np.asarray(band)) if is_16_bit else np.asarray(band.convert("RGB"))
    return pixels


def _to_8_bit(values: npt.NDArray[np.integer[Any]]) -> Pixels:
    """Return 16-bit gray values (H, W) as 8-bit values (H, W, 1), rounded."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise DecodeError(f"pixel values outside 16 bits ({low} to {high})")
    return ((values.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)[..., None]


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} is more than {MAX_PIXELS // 10**6} megapixels")
    if height < 1 or width < 1:
        raise DecodeError(f"an image of {width} x {height} pixels is empty")


def _one_line(error: BaseException) -> str:
    return " ".join(_OBJECT_ADDRESS.sub("", str(error)).split()) or type(error).__name__
