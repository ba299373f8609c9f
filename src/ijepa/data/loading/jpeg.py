"""The part of a JPEG that is wanted, through libjpeg-turbo.

Most of a JPEG's time goes into its Huffman codes, which can only be read from the start: what lies above a crop has to
be decoded, what lies below it need not. Where libjpeg-turbo's own library is at hand, it does just that (`turbojpeg`).
simplejpeg has no call for it, but the file says itself how high it is: with a smaller height in its header, the decoder
stops at that row, and finds the rest of the codes where it expects the end.

Chroma of half the height is smoothed over neighbouring rows, so two rows more than wanted are then decoded: the wanted
ones are the same to the bit as those of the whole image. What is broken below goes unseen, but for a file cut short.
"""

import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

from ijepa.data.loading.crop import Box
from ijepa.data.loading.turbojpeg import decode_box

Pixels = npt.NDArray[np.uint8]

_REST = "extraneous bytes before marker 0xd9"
"""What libjpeg says where the codes of further rows stand before the end of the image. It tells its first complaint."""

_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""A marker, but for those that may stand among codes."""
_BASELINE, _SCAN, _END, _RESTARTS = 0xC0, 0xDA, 0xD9, 0xDD
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)
"""Markers among those of the frames (C0 to CF) that are something else."""


def decode_part(data: bytes, height: int, width: int, box: Box) -> tuple[Pixels, int, int]:
    """Return the pixels (R, C, 3) uint8 that hold `box`, and the image's row and column where they begin.

    `data` is an RGB, YCbCr or grey JPEG of `height` x `width` pixels. Which files are taken, and what their box looks
    like, does not depend on whether the library is there.

    Raises:
        ValueError: libjpeg-turbo objects to the file, as far as it has to read it, or the file is cut short.
    """
    frame = None if (box.height, box.width) == (height, width) else _frame(data)
    if frame is None:
        return simplejpeg.decode_jpeg(data, colorspace="RGB"), 0, 0
    # Who does not read to the end does not see that it is missing: such a file is left to one who does.
    found = decode_box(data, box) if data.rstrip(b"\0").endswith(_END_OF_IMAGE) else None
    rows = min(height, box.top + box.height + frame.smoothed)
    return found or (_decode_rows(data, frame.at, rows, width), 0, 0)


class _Frame(NamedTuple):
    """Where a frame's height stands in the file, and how many rows below a pixel its chroma may depend on."""

    at: int
    smoothed: int


def _decode_rows(data: bytes, at: int, kept: int, width: int) -> Pixels:
    """Return the first rows of an image, whose height stands at `at`, as (kept, W, 3)."""
    pixels = np.empty((kept, width, 3), dtype=np.uint8)
    lower = b"".join((data[:at], kept.to_bytes(2, "big"), data[at + 2 :]))
    try:
        _fill(lower, pixels)
    except ValueError:
        # A marker among the codes of further rows, where there should be none? Then those that are wanted stand before.
        stray = _MARKER.search(lower, lower.index(_START_OF_SCAN, at) + 2)
        if stray is None:
            raise
        _fill(lower[: stray.start()] + _END_OF_IMAGE, pixels)
    return pixels


def _fill(data: bytes, pixels: Pixels) -> None:
    try:
        simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=pixels)
    except ValueError as error:
        if _REST not in str(error):
            raise


def _frame(data: bytes) -> _Frame | None:
    """Return the frame of a file whose rows come in one scan, from top to bottom; None for any other.

    None, too, with restart markers: complaints about one that is missing and about the rest would look alike.
    """
    at, frame, components = 2, None, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _BASELINE:
            components = data[at + 9]
            vertical = [factors & 15 for factors in data[at + 11 : at + 11 + 3 * components : 3]]
            frame = _Frame(at + 5, 2 if components > 1 and max(vertical, default=1) == 2 else 0)
        elif marker == _SCAN:
            return frame if data[at + 4] == components else None
        elif marker in (_END, _RESTARTS) or (0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES):
            return None
        at += 2 + length
    return None
