"""Intervals of a mean IoU, and of a mean: percentile bootstrap over test images.

An image is the unit that is drawn: pixels of one image are no independent witnesses. IoU over a data set needs of each
image three counts a class, not its whole confusion matrix: hits, true pixels, predicted pixels. So an interval takes
12 n C bytes for n images of C classes (3.6 MB for ADE20K's 2,000 and 150) and one product of (resamples, n) with them.

Which images a resample holds is drawn by (seed, Stream.BOOTSTRAP): encoders that are compared meet the same ones.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ijepa.evaluation.metrics.iou import Confusion, iou_of
from ijepa.utils.random import Stream, randint, random_bits

RESAMPLES = 1000

LEVEL = 0.95
"""How often an interval of this method is meant to hold the truth."""

_AT_ONCE = 64


def miou_interval(
    confusions: Sequence[Confusion], *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Return the interval of the mean over `confusions` of their mIoU, as shares.

    Args:
        confusions: runs over the same images in the same order; each resample is drawn for all of them.
        seed: of the draw.
        resamples: how many.
        level: the share of resamples that lies within.
    """
    counts = np.stack([confusion.of_images for confusion in confusions])  # (runs, n, 3, C)
    runs, n = counts.shape[:2]
    flat = counts.transpose(1, 0, 2, 3).reshape(n, -1).astype(np.float64)  # sums stay below 2^53: exact
    found = []
    for start in range(0, resamples, _AT_ONCE):
        weights = times_drawn(np.arange(start, min(start + _AT_ONCE, resamples)), n, seed)
        hit, true, predicted = (weights @ flat).reshape(-1, runs, *counts.shape[2:]).transpose(2, 0, 1, 3)
        found.append(_means(iou_of(hit, true, predicted, confusions[0].scored)).mean(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    sums: Sequence[float],
    *,
    seed: int,
    counts: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the interval of a mean over what is drawn independently.

    Args:
        sums: a value of each image, or the sum of several of each video.
        seed: of the draw.
        counts: how many values are in each sum; one if None.
        resamples, level: as in `miou_interval`.
    """
    values, each = np.asarray(sums, dtype=np.float64), np.asarray(counts or np.ones(len(sums)), dtype=np.float64)
    found = []
    for start in range(0, resamples, _AT_ONCE):
        drawn = times_drawn(np.arange(start, min(start + _AT_ONCE, resamples)), len(sums), seed)
        found.append((drawn @ values) / (drawn @ each))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def times_drawn(resamples: npt.NDArray[np.int64], n: int, seed: int) -> npt.NDArray[np.float64]:
    """Return how often each of n images is in each resample (R, n): n draws with replacement a row."""
    drawn = randint(random_bits(seed, Stream.BOOTSTRAP, resamples, n), n)
    return np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)


def _means(iou: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean over the last axis of what is not NaN, 0 where all is."""
    there = ~np.isnan(iou)
    return np.nan_to_num(iou).sum(-1) / np.maximum(there.sum(-1), 1)
