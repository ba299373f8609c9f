"""Every random draw of a run, as a function of (seed, stream, position) and of nothing else.

The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section
3.3), written here in integers because library streams change between versions. It has no state: a stream says
*what* is drawn, a position says *for which* sample (or epoch, or parameter), and any draw can be made again from
those numbers alone, in any order, on any rank or worker.

The 128-bit counter is (block of four words, position low, position high, stream) and the 64-bit key is the seed.
`VERSION` is written into every recipe; a change to anything in this file that changes a draw must raise it.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

VERSION = 1

Words = npt.NDArray[np.uint32]
Positions = npt.NDArray[np.int64]

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Stream(IntEnum):
    """What is drawn. Numbers are part of the format: never renumber, only append."""

    ORDER = 1
    CROP = 2
    MASK = 3
    DEPTH = 4
    WEIGHTS = 5
    SCENES = 6
    EVALUATION = 7
    HOLD_OUT = 8
    BOOTSTRAP = 9
    BLOCKS = 10
    WINDOWS = 11
    OFFSETS = 12


def philox(counter: npt.NDArray[np.uint32], seed: int) -> Words:
    """Encrypt counters (..., 4) of 32-bit words under a 64-bit seed: Philox-4x32 with ten rounds."""
    key_0, key_1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    x0, x1, x2, x3 = (counter[..., i].astype(np.uint64) for i in range(4))
    for _ in range(10):
        product_0, product_1 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_1
        x0, x1, x2, x3 = (
            (product_1 >> _SHIFT) ^ x1 ^ np.uint64(key_0),
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ x3 ^ np.uint64(key_1),
            product_0 & _LOW,
        )
        key_0, key_1 = (key_0 + _WEYL_0) & 0xFFFFFFFF, (key_1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def words(seed: int, stream: Stream, positions: npt.ArrayLike, count: int, *, skip: int = 0) -> Words:
    """Return (P, count) random 32-bit words: row i belongs to `positions[i]`, whatever else is asked for.

    `skip` leaves out that many words of each row, rounded up to whole blocks of four: later attempts of a
    rejection loop read on where the first one stopped.
    """
    place = np.atleast_1d(np.asarray(positions, dtype=np.int64)).astype(np.uint64)
    first, blocks = -(-skip // 4), -(-count // 4)
    counter = np.empty((len(place), blocks, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(first, first + blocks, dtype=np.uint32)
    counter[..., 1] = (place & _LOW).astype(np.uint32)[:, None]
    counter[..., 2] = (place >> _SHIFT).astype(np.uint32)[:, None]
    counter[..., 3] = int(stream)
    return philox(counter, seed).reshape(len(place), blocks * 4)[:, :count]


def uniform(word: Words) -> npt.NDArray[np.float64]:
    """Map words to floats in [0, 1): multiples of 2^-32."""
    return word.astype(np.float64) * 2.0**-32


def below(word: Words, bound: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Map words to integers in [0, bound), `bound` broadcast, by the high half of a 64-bit product.

    The bias is at most bound / 2^32: below 10^-7 for anything drawn here.
    """
    wide = word.astype(np.uint64) * np.asarray(bound, dtype=np.uint64)
    return (wide >> _SHIFT).astype(np.int64)


def name_position(name: str) -> int:
    """Return the position that stands for a name (a parameter's): 62 bits of FNV-1a, stable for ever."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value & 0x3FFFFFFFFFFFFFFF
