"""Every random draw of a run, as a function of (seed, stream, position) and of nothing else.

The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3),
written here in integers because the streams of libraries change between versions. It has no state: the stream says
*what* is drawn, the position says *for which* sample (or epoch, or parameter). So every draw can be repeated from these
numbers, in any order, on any rank or worker.

The 128-bit counter is (block of four words, position low, position high, stream), and the 64-bit key is the seed.
`VERSION` is written into every recipe. A change to this file that changes a draw must raise it.
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
    """What is drawn. The numbers are part of the format: append only, never renumber."""

    ORDER = 1
    CROP = 2
    MASK = 3
    DROP_PATH = 4
    WEIGHTS = 5
    SCENES = 6
    EVALUATION = 7
    HOLD_OUT = 8
    BOOTSTRAP = 9
    BLOCKS = 10
    WINDOWS = 11
    OFFSETS = 12


def philox(counter: npt.NDArray[np.uint32], seed: int) -> Words:
    """Return the output (..., 4) of Philox-4x32 with ten rounds for counters (..., 4) and a 64-bit seed."""
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


def random_bits(seed: int, stream: Stream, positions: npt.ArrayLike, count: int, *, skip: int = 0) -> Words:
    """Return (P, count) random 32-bit words; row i depends on the seed, the stream and `positions[i]` alone.

    `skip` leaves out that number of words at the start of each row, rounded up to a multiple of four, so that later
    attempts of a rejection loop continue where the first one stopped.
    """
    place = np.atleast_1d(np.asarray(positions, dtype=np.int64)).astype(np.uint64)
    first, blocks = -(-skip // 4), -(-count // 4)
    counter = np.empty((len(place), blocks, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(first, first + blocks, dtype=np.uint32)
    counter[..., 1] = (place & _LOW).astype(np.uint32)[:, None]
    counter[..., 2] = (place >> _SHIFT).astype(np.uint32)[:, None]
    counter[..., 3] = int(stream)
    return philox(counter, seed).reshape(len(place), blocks * 4)[:, :count]  # (P, blocks, 4) -> (P, blocks * 4)


def uniform(word: Words) -> npt.NDArray[np.float64]:
    """Map words to floats in [0, 1), multiples of 2^-32."""
    return word.astype(np.float64) * 2.0**-32


def randint(word: Words, bound: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Map words to integers in [0, bound), the high half of word * bound; `bound` is broadcast.

    The bias is at most bound / 2^32, which is below 10^-7 for everything drawn here.
    """
    wide = word.astype(np.uint64) * np.asarray(bound, dtype=np.uint64)
    return (wide >> _SHIFT).astype(np.int64)


def name_position(name: str) -> int:
    """Return the position of a name (of a parameter): 62 bits of its FNV-1a hash, which never changes."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value & 0x3FFFFFFFFFFFFFFF
