"""Bytes of an image file to pixels: exact, and refusing what is broken before it costs memory.

What the bytes *are* is read from the bytes, never from a file's suffix. JPEG goes to libjpeg-turbo through
simplejpeg, with the exact integer DCT and smooth chroma upsampling: its fast variants save two per cent of the time
and lose 30 dB. Everything else, and the JPEGs that libjpeg-turbo does not turn into RGB or objects to (CMYK, stray
bytes that harm nothing), goes to Pillow. Rotation noted in EXIF is ignored, as the field does; alpha is dropped; of
an animation the first frame counts.

A file that is cut short, or whose codes end before the picture does, is a `DecodeError` and never a picture with a grey
half. Damage that leaves as many codes as there should be goes unseen, as everywhere.
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
from ijepa.data.loading.jpeg import Pixels, decode_part

MaskColours = Literal["refuse", "accept", "only"]
"""What becomes of a mask's colours: RGB files are refused, accepted beside indices, or every file is read as RGB."""

MAX_PIXELS = 120_000_000
"""Larger images are refused by their header. A worker needs `BYTES_A_PIXEL` for one of this size, so 2.2 GB at most."""

BYTES_A_PIXEL = 18
"""Bound on the memory that decoding takes, result included: a plain JPEG takes its three, PNG eight, WebP seventeen."""

FORMATS = ("PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF", "PPM")
"""What Pillow may open. Named, because its full list holds formats that start other programs."""

_ENDS_EARLY = "premature end of data segment"
"""What libjpeg says where a picture's codes end before it does; Pillow would fill it up with grey."""
_BAND = 2**18
"""Pixels that are converted together."""
_JPEG = b"\xff\xd8\xff"
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
"""How Python shows an object; Pillow names the stream that it cannot read."""


class DecodeError(ValueError):
    """These bytes are no image that can be read in full; `str()` says why, in one line."""


def image_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) from the header alone."""
    if data.startswith(_JPEG):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        except (ValueError, KeyError):  # KeyError: of samplings that simplejpeg has no name for
            return _size_by_pillow(data)
        return int(height), int(width)
    return _size_by_pillow(data)


def decode(data: bytes) -> Pixels:
    """Return the image as (H, W, 3) uint8, sRGB as stored.

    Raises:
        DecodeError: the data are no image, cut short, or of more than `MAX_PIXELS`.
    """
    return decode_for(data, lambda height, width: [Box(0, 0, height, width)])[0]


def decode_for(data: bytes, choose: Callable[[int, int], Sequence[Box]]) -> tuple[Pixels, Sequence[Box]]:
    """Return pixels as `decode` does, and the boxes in them that `choose` wants of an image of its (height, width).

    What lies outside the boxes may be missing: a JPEG is decoded no further than it has to be. What is broken below
    them goes unseen, unless the file is cut short.

    Raises:
        DecodeError: as `decode`.
    """
    if data.startswith(_JPEG):
        found = _decode_jpeg(data, choose)
        if found is not None:
            return found
    with _open(data) as image:
        _check_size(image.height, image.width)
        boxes = choose(image.height, image.width)
        try:
            return _to_rgb(image), boxes
        except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
            raise DecodeError(_line(error)) from error


def decode_mask(data: bytes, colours: MaskColours = "refuse") -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Return an index mask as (H, W): a palette's indices or grey values, uint8, or uint16 of a 16-bit file.

    Where `colours` lets them in, an RGB file is (H, W, 3) uint8; with "only", so is a palette's.

    Raises:
        DecodeError: as `decode`, and for colours that name no class.
    """
    with _open(data) as image:
        _check_size(image.height, image.width)
        try:
            coloured = colours == "only" or (colours == "accept" and image.mode in ("RGB", "RGBA"))
            values = np.asarray(image.convert("RGB") if coloured else image)
        except Exception as error:  # as above
            raise DecodeError(_line(error)) from error
        mode = image.mode
    if coloured:
        return values
    if mode in ("L", "P", "1"):
        return values.astype(np.uint8)
    if mode.startswith("I") and values.size and values.min() >= 0 and values.max() <= 0xFFFF:
        return values.astype(np.uint16)
    raise DecodeError(f"a mask holds one class index a pixel, and this one is {mode}")


def _decode_jpeg(data: bytes, choose: Callable[[int, int], Sequence[Box]]) -> tuple[Pixels, Sequence[Box]] | None:
    """Return what `decode_for` does, or None where Pillow should have a look."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        if colours not in ("YCbCr", "Gray", "RGB"):
            return None
        boxes = choose(height, width)
        pixels, top, left = decode_part(data, height, width, hull(boxes))
        return pixels, [Box(box.top - top, box.left - left, box.height, box.width) for box in boxes]
    except DecodeError:
        raise
    except (ValueError, KeyError) as error:  # KeyError: of samplings that simplejpeg has no name for
        if _ENDS_EARLY in str(error):
            raise DecodeError(_line(error)) from error
        return None


def _size_by_pillow(data: bytes) -> tuple[int, int]:
    with _open(data) as image:
        return image.height, image.width


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DecodeError("no bytes at all")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images; the rule here is MAX_PIXELS, checked by the callers.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # twice its limit, which lies above ours
        raise DecodeError(f"more than {MAX_PIXELS // 10**6} megapixels") from error
    except Exception as error:  # as above
        raise DecodeError(_line(error)) from error


def _to_rgb(image: Image.Image) -> Pixels:
    """Convert some rows at a time: whole copies between would be what a worker's memory is made of."""
    if image.mode == "F":
        raise DecodeError("floating-point pixels, whose range is unknown")
    image.load()
    pixels: Pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        band = image if rows >= image.height else image.crop((0, top, image.width, bottom))
        wide = image.mode.startswith("I")  # "I;16", "I;16B", and "I" for 16-bit files in older Pillow
        pixels[top:bottom] = _narrowed(np.asarray(band)) if wide else np.asarray(band.convert("RGB"))
    return pixels


def _narrowed(values: npt.NDArray[np.integer[Any]]) -> Pixels:
    """Return 16-bit grey values (H, W) as (H, W, 1) of eight bits, rounded."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise DecodeError(f"pixel values outside 16 bits ({low} to {high})")
    return ((values.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)[..., None]


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} is more than {MAX_PIXELS // 10**6} megapixels")
    if height < 1 or width < 1:
        raise DecodeError(f"an image of {width} x {height} pixels")


def _line(error: BaseException) -> str:
    """Return the reason as one line, without the address of an object, which differs from process to process."""
    return " ".join(_OBJECT.sub("", str(error)).split()) or type(error).__name__
