"""Which sample stands at each place of the endless sequence: a permutation an epoch, computed and never stored.

`global` permutes all samples. `blocks` is for disks that seek slowly: runs of neighbouring samples are permuted, and
then the samples within a window of some runs, so that whatever is read soon lies in a few places. Both are permutations
of the whole set in every epoch and functions of the position alone.

Position p lies in epoch p // n, at place p % n of it, and each epoch visits every sample once. The permutation is
a Feistel network in the generalised form of Black and Rogaway ("Ciphers with arbitrary finite domains", CT-RSA
2002, section 5): a place is split into (left, right) on a grid a * b >= n, and the rounds add to one half, modulo
its size, a pseudo-random function of the other, which any round can undo. A result in the few cells beyond n goes
round again ("cycle walking"), so what remains is a permutation of exactly n. The function is Philox, keyed by the
seed, with half, epoch and round in its counter.

A shuffled array costs 8 n bytes and a second in every worker at 14 million samples, and its order would change
with the library that shuffles. This takes no memory, and any batch of any epoch costs the same.

The grid is as square as n allows, so fewer than sqrt(n) cells lie beyond n and walking is rare. Eight rounds: four
suffice against a bounded observer of large domains (Luby and Rackoff 1988); the rest is for small ones.

On a grid of up to 3 x 3 cells, eight rounds give some orders more often than others: on 3 x 3 cells, for example, every
round is an even permutation. Sets of at most nine samples are therefore shuffled by the method of Fisher and Yates.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ijepa.utils.random import Stream, philox, randint

ROUNDS = 8
SHUFFLED = 9
"""Largest set whose epochs are shuffled as arrays."""

_SHUFFLE = 255
"""The round's number in the counters of a shuffle: the network has fewer rounds."""
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of a run's samples.

    Attributes:
        seed: the run's.
        n: samples of the data set.
        kind: `global` or `blocks`.
        block: neighbouring samples of a run, in the order `blocks`.
        window: runs whose samples are mixed, in the order `blocks`.
    """

    seed: int
    n: int
    kind: Literal["global", "blocks"] = "global"
    block: int = 256
    window: int = 64

    def indices(self, positions: npt.ArrayLike) -> Integers:
        """Return the sample (P,) that stands at each position (P,) of the endless sequence."""
        if self.kind == "global" or self.n <= SHUFFLED:
            return sample_indices(self.seed, positions, self.n)
        epoch, place = _epochs(positions, self.n)
        runs = self.n // self.block
        mixed = self._mixed(epoch, place, runs)
        run, within = np.divmod(mixed, self.block)
        whole = run < runs
        # The samples that fill no run stay behind all runs; a rotation by epoch makes them others every time.
        if runs:
            moved = _permuted(self.seed, epoch[whole], run[whole], runs, Stream.BLOCKS)
            mixed[whole] = moved * self.block + within[whole]
        counter = np.zeros((len(epoch), 4), dtype=np.uint32)
        counter[:, 0], counter[:, 1], counter[:, 3] = epoch & int(_LOW), epoch >> 32, int(Stream.OFFSETS)
        return (mixed + randint(philox(counter, self.seed)[:, 0], self.n)) % self.n

    def _mixed(self, epoch: Integers, place: Integers, runs: int) -> Integers:
        """Permute places within their windows; the last window has what is left, up to twice as much."""
        size = self.window * self.block
        windows = max(runs // self.window, 1)
        number = np.minimum(place // size, windows - 1)
        begin, found = number * size, np.empty_like(place)
        key = epoch * windows + number
        for chosen, count in ((number < windows - 1, size), (number == windows - 1, self.n - (windows - 1) * size)):
            inner = _permuted(self.seed, key[chosen], (place - begin)[chosen], count, Stream.WINDOWS)
            found[chosen] = begin[chosen] + inner
        return found


def sample_indices(seed: int, positions: npt.ArrayLike, n: int) -> Integers:
    """Return the sample (P,) that stands at each position (P,) of the endless sequence over n samples."""
    epoch, place = _epochs(positions, n)
    if n <= SHUFFLED:
        return _shuffled(seed, epoch, n)[np.arange(len(place)), place]
    return _permuted(seed, epoch, place, n, Stream.ORDER)


def _shuffled(seed: int, epoch: Integers, n: int) -> Integers:
    """Return an order (P, n) of n samples for each epoch (P,), all n! equally likely (Fisher and Yates)."""
    order, row = np.tile(np.arange(n), (len(epoch), 1)), np.arange(len(epoch))
    for last in range(n - 1, 0, -1):
        counter = _counters(epoch, Stream.ORDER, _SHUFFLE)
        counter[:, 0] = last
        other = randint(philox(counter, seed)[:, 0], last + 1)
        order[row, other], order[:, last] = order[:, last].copy(), order[row, other]
    return order


def _counters(epoch: Integers, stream: Stream, turn: int) -> npt.NDArray[np.uint32]:
    """Return counters (P, 4) of a round; their first word is the caller's to set."""
    counter, wide = np.empty((len(epoch), 4), dtype=np.uint32), epoch.astype(np.uint64)
    counter[:, 1] = wide & _LOW
    # The epoch's high half is 0 for all but toy sets; there it shares a word with the round's number.
    counter[:, 2] = ((wide >> _SHIFT) << np.uint64(8)) | np.uint64(turn)
    counter[:, 3] = int(stream)
    return counter


def _epochs(positions: npt.ArrayLike, n: int) -> tuple[Integers, Integers]:
    """Return the epoch of each position, and its place in it."""
    position = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    if n < 1:
        raise ValueError(f"an order needs at least one sample, not {n}")
    if len(position) and int(position.min()) < 0:
        raise ValueError("positions start at 0")
    epoch, place = np.divmod(position, n)
    return epoch, place


def _permuted(seed: int, key: Integers, place: Integers, n: int, stream: Stream) -> Integers:
    """Return where a permutation of n, another one for every `key`, takes each place (P,)."""
    index = _encrypt(seed, key, place, n, stream)
    beyond = np.flatnonzero(index >= n)
    while len(beyond):
        index[beyond] = _encrypt(seed, key[beyond], index[beyond], n, stream)
        beyond = beyond[index[beyond] >= n]
    return index


def _encrypt(seed: int, epoch: Integers, place: Integers, n: int, stream: Stream) -> Integers:
    """Permute the cells (P,) of the grid a * b >= n; cells of different epochs are permuted differently."""
    columns = math.isqrt(n - 1) + 1
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
