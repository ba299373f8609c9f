"""Intervals of a mean IoU and of a mean: percentile bootstrap over test images (Efron, 1979).

Images are drawn, not pixels, because pixels of one image are not independent. IoU over a data set needs three counts
per image and class: correct, true and predicted pixels. So an interval takes 12 n C bytes for n images and C classes
(3.6 MB for ADE20K with 2,000 and 150) and one matrix product with (resamples, n).

The images of a resample are drawn by (seed, Stream.BOOTSTRAP), so that compared encoders have the same resamples.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ijepa.evaluation.metrics.iou import Confusion, iou_of
from ijepa.utils.random import Stream, randint, random_bits

RESAMPLES = 1000

LEVEL = 0.95
"""Share of such intervals that contain the true value."""

_AT_ONCE = 64
"""Resamples per matrix product."""


def miou_interval(
    confusions: Sequence[Confusion], *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Return the interval of the mean over `confusions` of their mIoU, as shares.

    Args:
        confusions: runs on the same images in the same order, which share the resamples.
        seed: seed of the draw.
        resamples: number of resamples.
        level: share of the resamples inside the interval.
    """
    counts = np.stack([confusion.of_images for confusion in confusions])  # (runs, n, 3, C)
    runs, n = counts.shape[:2]
    flat = counts.transpose(1, 0, 2, 3).reshape(n, -1).astype(np.float64)  # sums stay below 2^53: exact
    found = []
    for start in range(0, resamples, _AT_ONCE):
        weights = times_drawn(np.arange(start, min(start + _AT_ONCE, resamples)), n, seed)
        sums = (weights @ flat).reshape(-1, runs, *counts.shape[2:])  # (R, runs, 3, C)
        hit, true, predicted = sums.transpose(2, 0, 1, 3)
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
    """Return the interval of a mean over independent units.

    Args:
        sums: value of each image, or sum of the values of each video.
        seed: seed of the draw.
        counts: number of values in each sum; 1 if None.
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
    """Return how often each of n images is in each resample, (R, n): n draws with replacement per row."""
    drawn = randint(random_bits(seed, Stream.BOOTSTRAP, resamples, n), n)
    return np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)


def _means(iou: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean over the last axis without NaN, 0 if all values are NaN."""
    there = ~np.isnan(iou)
    return np.nan_to_num(iou).sum(-1) / np.maximum(there.sum(-1), 1)
