"""Decode a rectangle of a JPEG with libjpeg-turbo's own library, if it is installed.

simplejpeg bundles libjpeg-turbo, but its interface cannot decode a part of an image. libjpeg-turbo 3 can: above, left
and right of the rectangle it reads only the Huffman codes, and it reads nothing below. The library is the one of the
system, or that of the package `turbojpeg` (the extra of this name). The pixels are the same bits in either case.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ijepa.data.loading.crop import Box

_LIBRARY_FILES = ("libturbojpeg.so.0", "libturbojpeg.0.dylib", "libturbojpeg.dylib", "turbojpeg.dll")
"""Linux, macOS (two names) and Windows."""

# Constants of turbojpeg.h: an init type, a pixel format, and parameters (TJPARAM_*).
_INIT_DECOMPRESS, _RGB = 1, 0
_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT, _PROGRESSIVE = 0, 4, 5, 6, 12
_BLOCK_WIDTHS = (8, 16, 16, 8, 8, 32, 8)
"""Width in pixels of an MCU (the unit that is coded together) for 4:4:4, 4:2:2, 4:2:0, gray, 4:4:0, 4:1:1, 4:4:1."""

_SMOOTHING_PIXELS = 2
"""Chroma upsampling reads this many pixels outside the box."""


class _Region(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, or None if there is none of version 3."""
    spec = importlib.util.find_spec("turbojpeg")
    folder = Path(spec.origin).parent / "turbojpeg.libs" if spec and spec.origin else None
    bundled = map(str, sorted(folder.glob("libturbojpeg*"))) if folder else ()
    for name in (*_LIBRARY_FILES, *bundled):
        try:
            return _declare_types(ctypes.CDLL(name))
        except (OSError, AttributeError):  # not installed, or version 2, which has no tj3 functions
            continue
    return None


def decode_box(data: bytes, box: Box) -> tuple[npt.NDArray[np.uint8], int, int] | None:
    """Decode the part of a JPEG that contains `box`.

    Returns:
        The pixels (R, C, 3) uint8, and the row and column of the image where they begin. None if there is no library,
        or if it decodes no region of this kind of file.

    Raises:
        ValueError: the library reports an error or a warning down to the last row of the box.
    """
    lib = library()
    if lib is None:
        return None
    # A new decoder for each file: a reused one would lend its Huffman tables to a damaged file that has none.
    handle = lib.tj3Init(_INIT_DECOMPRESS)
    try:
        return _decode(lib, handle, data, box)
    finally:
        lib.tj3Destroy(handle)


def _decode(lib: ctypes.CDLL, handle: int, data: bytes, box: Box) -> tuple[npt.NDArray[np.uint8], int, int] | None:
    def check(failed: int) -> None:
        if failed:
            raise ValueError(lib.tj3GetErrorStr(handle).decode())

    lib.tj3Set(handle, _STOP_ON_WARNING, 1)
    check(lib.tj3DecompressHeader(handle, data, len(data)))
    width, height, sampling = (lib.tj3Get(handle, name) for name in (_WIDTH, _HEIGHT, _SUBSAMPLING))
    # libjpeg smooths progressive files that lack scans across blocks, so a region would differ from the whole image.
    if not 0 <= sampling < len(_BLOCK_WIDTHS) or lib.tj3Get(handle, _PROGRESSIVE):
        return None
    block = _BLOCK_WIDTHS[sampling]
    top, left = max(0, box.top - _SMOOTHING_PIXELS), max(0, (box.left - _SMOOTHING_PIXELS) // block * block)
    bottom, right = min(height, box.top + box.height), min(width, box.left + box.width + _SMOOTHING_PIXELS)
    pixels = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
    check(lib.tj3SetCroppingRegion(handle, _Region(left, top, right - left, bottom - top)))
    check(lib.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, _RGB))
    return pixels, top, left


def _declare_types(lib: ctypes.CDLL) -> ctypes.CDLL:
    handle, number = ctypes.c_void_p, ctypes.c_int
    lib.tj3Init.restype, lib.tj3Init.argtypes = handle, [number]
    lib.tj3Destroy.restype, lib.tj3Destroy.argtypes = None, [handle]
    lib.tj3Set.argtypes, lib.tj3Get.argtypes = [handle, number, number], [handle, number]
    lib.tj3DecompressHeader.argtypes = [handle, ctypes.c_char_p, ctypes.c_size_t]
    lib.tj3SetCroppingRegion.argtypes = [handle, _Region]
    lib.tj3Decompress8.argtypes = [handle, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, number, number]
    lib.tj3GetErrorStr.restype, lib.tj3GetErrorStr.argtypes = ctypes.c_char_p, [handle]
    return lib
