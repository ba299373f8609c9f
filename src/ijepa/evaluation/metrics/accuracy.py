"""Metrics of image classification: accuracies with their interval, and a description of the labeled set.

The interval is the percentile bootstrap over test images. Accuracy is a mean of zeros and ones, so its bootstrap
distribution is Binomial(n, accuracy) / n; its quantiles are the limit of infinitely many resamples, without a seed.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.sources.base import Source
from ijepa.evaluation.metrics.bootstrap import LEVEL


def class_ranks(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the rank of the true class in each row, (B,) int64, from 0 for the best; the lower of equal classes first.

    If scores are NaN, the true class is last, so that a head that diverged is wrong.

    Args:
        scores: (B, C).
        truth: true classes (B,).
    """
    own = scores.gather(1, truth[:, None])
    behind = (scores == own) & (torch.arange(scores.shape[1], device=scores.device) > truth[:, None])
    return scores.shape[1] - 1 - ((scores < own) | behind).sum(1)


def accuracies(ranks: Tensor) -> dict[str, Any]:
    """Return `top1`, `top5` and `ci`, the 95 % interval of top-1, from the ranks (m,) of the true classes."""
    right = ranks == 0
    return {
        "top1": float(right.double().mean()),
        "top5": float((ranks < 5).double().mean()),
        "ci": list(interval(int(right.sum()), len(ranks))),
    }


def interval(right: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the bootstrap interval of an accuracy of `right` / `total`, as shares."""
    if right in (0, total):
        return right / total, right / total
    k, p = torch.arange(total + 1, dtype=torch.float64), right / total
    # Cumulative binomial distribution, from logarithms because the coefficients overflow.
    ways = torch.tensor(total + 1.0, dtype=torch.float64).lgamma() - (k + 1).lgamma() - (total - k + 1).lgamma()
    below = (ways + k * np.log(p) + (total - k) * np.log1p(-p)).exp().cumsum(0)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.searchsorted(below, ends).clamp(max=total).tolist()
    return low / total, high / total


def describe(source: Source, labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return the entry of a result about a labeled set; `labels` (n,) are those of the images that were used."""
    return {"n": len(labels), "classes": len(np.unique(labels)), "fingerprint": source.fingerprint}
