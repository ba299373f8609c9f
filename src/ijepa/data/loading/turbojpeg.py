"""A box of a JPEG decoded alone, by libjpeg-turbo's own library where there is one.

simplejpeg carries libjpeg-turbo, but shows no call for a part of an image. Version 3 of the library has one: of what
lies above the box and beside it only the codes are read, and nothing of what lies below. The library is the system's or
that of the wheel `turbojpeg` (the extra of this name). Without it `jpeg` has the same pixels, to the bit, a little
later.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ijepa.data.loading.crop import Box

_NAMES = ("libturbojpeg.so.0", "libturbojpeg.0.dylib", "libturbojpeg.dylib", "turbojpeg.dll")
"""The library's file on Linux, macOS and Windows."""

# Names of turbojpeg.h.
_INIT_DECOMPRESS, _RGB = 1, 0
_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT = 0, 4, 5, 6
_BLOCK_WIDTHS = (8, 16, 16, 8, 8, 32, 8)
"""Pixels that are coded together, across, by chroma subsampling: 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1, 4:4:1."""

_SMOOTHED = 2
"""Pixels above and beside the box that its chroma may depend on."""


class _Region(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, or None where there is none of version 3."""
    spec = importlib.util.find_spec("turbojpeg")
    beside = Path(spec.origin).parent / "turbojpeg.libs" if spec and spec.origin else None
    bundled = map(str, sorted(beside.glob("libturbojpeg*"))) if beside else ()
    for name in (*_NAMES, *bundled):
        try:
            found = ctypes.CDLL(name)
            return _typed(found)
        except (OSError, AttributeError):  # not there, or older: version 2 has no regions
            continue
    return None


def decode_box(data: bytes, box: Box) -> tuple[npt.NDArray[np.uint8], int, int] | None:
    """Return the pixels (R, C, 3) uint8 around `box` and the image's row and column where they begin.

    None where it cannot be done: no library, or a kind of file that it has no regions for.

    Raises:
        ValueError: the library objects to the file, as far as the box's last row.
    """
    found = library()
    if found is None:
        return None
    # One for each file: used again, it would lend the tables of the last to a file that lacks its own.
    handle = found.tj3Init(_INIT_DECOMPRESS)
    try:
        return _decoded(found, handle, data, box)
    finally:
        found.tj3Destroy(handle)


def _decoded(found: ctypes.CDLL, handle: int, data: bytes, box: Box) -> tuple[npt.NDArray[np.uint8], int, int] | None:
    found.tj3Set(handle, _STOP_ON_WARNING, 1)
    if found.tj3DecompressHeader(handle, data, len(data)):
        raise ValueError(found.tj3GetErrorStr(handle).decode())
    width, height, sampling = (found.tj3Get(handle, name) for name in (_WIDTH, _HEIGHT, _SUBSAMPLING))
    if not 0 <= sampling < len(_BLOCK_WIDTHS):
        return None
    block = _BLOCK_WIDTHS[sampling]
    top, left = max(0, box.top - _SMOOTHED), max(0, (box.left - _SMOOTHED) // block * block)
    # No more rows than asked for: whether codes below are broken is not to matter.
    bottom, right = min(height, box.top + box.height), min(width, box.left + box.width + _SMOOTHED)
    pixels = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
    if found.tj3SetCroppingRegion(handle, _Region(left, top, right - left, bottom - top)):
        raise ValueError(found.tj3GetErrorStr(handle).decode())
    if found.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, _RGB):
        raise ValueError(found.tj3GetErrorStr(handle).decode())
    return pixels, top, left


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    handle, number = ctypes.c_void_p, ctypes.c_int
    found.tj3Init.restype, found.tj3Init.argtypes = handle, [number]
    found.tj3Destroy.restype, found.tj3Destroy.argtypes = None, [handle]
    found.tj3Set.argtypes, found.tj3Get.argtypes = [handle, number, number], [handle, number]
    found.tj3DecompressHeader.argtypes = [handle, ctypes.c_char_p, ctypes.c_size_t]
    found.tj3SetCroppingRegion.argtypes = [handle, _Region]
    found.tj3Decompress8.argtypes = [handle, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, number, number]
    found.tj3GetErrorStr.restype, found.tj3GetErrorStr.argtypes = ctypes.c_char_p, [handle]
    return found
