"""The part of a JPEG that is wanted, through libjpeg-turbo.

Most of a JPEG's time goes into its Huffman codes, which can only be read from the start: what lies above a crop has to
be decoded, what lies below it need not. Where libjpeg-turbo's own library is at hand, it does just that (`turbojpeg`).
simplejpeg has no call for it, but the file says itself how high it is: with a smaller height in its header, the decoder
stops at that row, and finds the rest of the codes where it expects the end.

Chroma of half the height is smoothed over neighbouring rows, so two rows more than wanted are decoded: the wanted ones
are the same to the bit as those of the whole image. What is broken below them goes unseen, but for a file cut short.
"""

import numpy as np
import numpy.typing as npt
import simplejpeg

from ijepa.data.crop import Box
from ijepa.data.turbojpeg import decode_box

_SMOOTHED = 2
"""Rows below the last wanted one that its chroma may depend on."""
_REST = "extraneous bytes before marker 0xd9"
"""What libjpeg says where the codes of further rows stand before the end of the image. It tells its first complaint."""

_END_OF_IMAGE = b"\xff\xd9"
_BASELINE, _SCAN, _END, _RESTARTS = 0xC0, 0xDA, 0xD9, 0xDD
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)
"""Markers among those of the frames (C0 to CF) that are something else."""


def decode_part(data: bytes, height: int, width: int, box: Box) -> tuple[npt.NDArray[np.uint8], int, int]:
    """Return the pixels (R, C, 3) uint8 that hold `box`, and the image's row and column where they begin.

    `data` is an RGB, YCbCr or grey JPEG of `height` x `width` pixels.

    Raises:
        ValueError: libjpeg-turbo objects to the file, as far as it read it, or the file is cut short.
    """
    # Who does not read to the end does not see that it is missing: such a file is left to one who does.
    if (box.height, box.width) != (height, width) and data.rstrip(b"\0").endswith(_END_OF_IMAGE):
        found = decode_box(data, box)
        if found is not None:
            return found
    return decode_rows(data, height, width, box.top + box.height), 0, 0


def decode_rows(data: bytes, height: int, width: int, rows: int) -> npt.NDArray[np.uint8]:
    """Return the first rows of an image as (R, W, 3) uint8: `rows` <= R <= `height`. Raises as `decode_part`."""
    kept = rows + _SMOOTHED
    at = _height_at(data) if kept < height else None
    if at is None:
        whole: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return whole
    pixels = np.empty((kept, width, 3), dtype=np.uint8)
    lower = b"".join((data[:at], kept.to_bytes(2, "big"), data[at + 2 :]))
    try:
        simplejpeg.decode_jpeg(lower, colorspace="RGB", buffer=pixels)
    except ValueError as error:
        if _REST not in str(error):
            raise
    return pixels


def _height_at(data: bytes) -> int | None:
    """Return where the height stands in a file whose rows come in one scan, from top to bottom; None for any other.

    None, too, with restart markers: complaints about one that is missing and about the rest would look alike.
    """
    at, height_at, components = 2, None, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _BASELINE:
            height_at, components = at + 5, data[at + 9]
        elif marker == _SCAN:
            return height_at if data[at + 4] == components else None
        elif marker in (_END, _RESTARTS) or (0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES):
            return None
        at += 2 + length
    return None
