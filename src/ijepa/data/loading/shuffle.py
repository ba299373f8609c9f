"""The order of samples: one permutation per epoch, which is computed and never stored.

`global` permutes all samples. `blocks` is for disks with slow seeks: blocks of neighboring samples are permuted, and
then the samples within a window of some blocks, so that the reads of some minutes are in few places. Both are
permutations of the whole set in every epoch, and functions of the position alone.

Position p of the endless sequence is in epoch p // n, at place p % n. The permutation is a Feistel network in the
generalized form of Black and Rogaway ("Ciphers with arbitrary finite domains", CT-RSA 2002, section 5): a place is
split into (left, right) on a grid a * b >= n, and each round adds to one half, modulo its size, a pseudo-random
function of the other half, which can be undone. A result in one of the few cells beyond n is permuted again ("cycle
walking"), so the result is a permutation of exactly n places. The function is Philox with the seed as key, and half,
epoch and round in its counter.

A shuffled array would take 8 n bytes and a second in every worker for 14 million samples, and its order would change
with the library that shuffles. This takes no memory, and any batch of any epoch costs the same.

The grid is as square as n allows, so fewer than sqrt(n) cells are beyond n and walking is rare. Four rounds suffice
against a bounded observer of large domains (Luby and Rackoff 1988); there are eight because of small domains.

On a grid of up to 3 x 3 cells, even eight rounds give some orders more often than others: on 3 x 3 cells, for example,
each round is an even permutation. Sets of at most nine samples are therefore shuffled by the method of Fisher and
Yates.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ijepa.utils.random import Stream, philox, randint

ROUNDS = 8
SMALL = 9
"""The largest set whose epochs are shuffled as arrays."""

_SHUFFLE_ROUND = 255
"""The round number in the counters of a shuffle; the network has fewer rounds."""
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of the samples of a run.

    Attributes:
        seed: the seed of the run.
        n: number of samples in the data set.
        kind: `global` or `blocks`.
        block: number of neighboring samples in a block, for `blocks`.
        window: number of blocks whose samples are mixed, for `blocks`.
    """

    seed: int
    n: int
    kind: Literal["global", "blocks"] = "global"
    block: int = 256
    window: int = 64

    def indices(self, positions: npt.ArrayLike) -> Integers:
        """Return the samples (P,) at positions (P,) of the endless sequence."""
        if self.kind == "global" or self.n <= SMALL:
            return sample_indices(self.seed, positions, self.n)
        epoch, place = _epochs(positions, self.n)
        blocks = self.n // self.block
        mixed = self._mix_within_windows(epoch, place, blocks)
        block, within = np.divmod(mixed, self.block)
        if blocks:
            full = block < blocks
            moved = _permute(self.seed, epoch[full], block[full], blocks, Stream.BLOCKS)
            mixed[full] = moved * self.block + within[full]
        # The samples at the end that fill no block always come last. A rotation by a random offset per epoch makes them
        # different samples in every epoch.
        counter = np.zeros((len(epoch), 4), dtype=np.uint32)
        counter[:, 0], counter[:, 1], counter[:, 3] = epoch & int(_LOW), epoch >> 32, int(Stream.OFFSETS)
        return (mixed + randint(philox(counter, self.seed)[:, 0], self.n)) % self.n

    def _mix_within_windows(self, epoch: Integers, place: Integers, blocks: int) -> Integers:
        """Permute places within their windows; the last window also has the rest, so it is up to twice as large."""
        size = self.window * self.block
        windows = max(blocks // self.window, 1)
        number = np.minimum(place // size, windows - 1)
        begin, found = number * size, np.empty_like(place)
        key = epoch * windows + number
        last = number == windows - 1
        for chosen, count in ((~last, size), (last, self.n - (windows - 1) * size)):
            inner = _permute(self.seed, key[chosen], (place - begin)[chosen], count, Stream.WINDOWS)
            found[chosen] = begin[chosen] + inner
        return found


def sample_indices(seed: int, positions: npt.ArrayLike, n: int) -> Integers:
    """Return the samples (P,) at positions (P,) of the endless sequence over n samples, in the order `global`."""
    epoch, place = _epochs(positions, n)
    if n <= SMALL:
        return _shuffle(seed, epoch, n)[np.arange(len(place)), place]
    return _permute(seed, epoch, place, n, Stream.ORDER)


def _shuffle(seed: int, epoch: Integers, n: int) -> Integers:
    """Return an order (P, n) of n samples for each epoch (P,); all n! are equally likely (Fisher and Yates)."""
    order, row = np.tile(np.arange(n), (len(epoch), 1)), np.arange(len(epoch))
    for last in range(n - 1, 0, -1):
        counter = _counters(epoch, Stream.ORDER, _SHUFFLE_ROUND)
        counter[:, 0] = last
        other = randint(philox(counter, seed)[:, 0], last + 1)
        order[row, other], order[:, last] = order[:, last].copy(), order[row, other]
    return order


def _counters(epoch: Integers, stream: Stream, round_number: int) -> npt.NDArray[np.uint32]:
    """Return Philox counters (P, 4) for a round. The caller has to set their first word."""
    counter, wide = np.empty((len(epoch), 4), dtype=np.uint32), epoch.astype(np.uint64)
    counter[:, 1] = wide & _LOW
    # The high half of the epoch is 0 except for tiny sets. It shares a word with the number of the round.
    counter[:, 2] = ((wide >> _SHIFT) << np.uint64(8)) | np.uint64(round_number)
    counter[:, 3] = int(stream)
    return counter


def _epochs(positions: npt.ArrayLike, n: int) -> tuple[Integers, Integers]:
    """Return the epoch (P,) of each position and its place (P,) in the epoch."""
    position = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    if n < 1:
        raise ValueError(f"an order needs at least one sample, not {n}")
    if len(position) and int(position.min()) < 0:
        raise ValueError("positions start at 0")
    epoch, place = np.divmod(position, n)
    return epoch, place


def _permute(seed: int, key: Integers, place: Integers, n: int, stream: Stream) -> Integers:
    """Permute places (P,) of a set of n; each `key` (P,) has its own permutation."""
    # Cycle walking: cells beyond n are permuted again until all are below n.
    index = _encrypt(seed, key, place, n, stream)
    beyond = np.flatnonzero(index >= n)
    while len(beyond):
        index[beyond] = _encrypt(seed, key[beyond], index[beyond], n, stream)
        beyond = beyond[index[beyond] >= n]
    return index


def _encrypt(seed: int, epoch: Integers, place: Integers, n: int, stream: Stream) -> Integers:
    """Permute cells (P,) of the grid with at least n cells; each epoch (P,) has its own permutation."""
    columns = math.isqrt(n - 1) + 1  # the square root of n, rounded up
    rows = -(-n // columns)
    left, right = np.divmod(place, columns)
    counter = _counters(epoch, stream, 0)
    for _ in range(0, ROUNDS, 2):
        counter[:, 0] = right
        left = (left + randint(philox(counter, seed)[:, 0], rows)) % rows
        counter[:, 2] += np.uint32(1)  # the next round
        counter[:, 0] = left
        right = (right + randint(philox(counter, seed)[:, 0], columns)) % columns
        counter[:, 2] += np.uint32(1)
    return left * columns + right
