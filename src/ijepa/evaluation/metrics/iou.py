"""Scores of a segmentation, from one confusion matrix over the whole data set.

IoU is a ratio of sums over the data set, not a mean of ratios over images, so counts are all that is kept; of each
image the three sums an IoU needs, for the bootstrap of its interval (`bootstrap`). A class
that is neither in the truth nor in the prediction has no IoU. `miou` leaves it out of the mean, as scikit-learn
does; `miou_absent_zero` counts it as 0, as some tools do: a perfect prediction with one of 21 classes absent then
scores 20/21. A class that is predicted and not there has IoU 0 in both.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


class Confusion:
    """Counts (C, C) of pixels by true class (row) and predicted class (column); ignored labels count nowhere.

    Args:
        classes: C; true labels are below it or ignored.
        ignore: labels that mean "not scored". Those below C are left out of every mean, too.
    """

    def __init__(self, classes: int, ignore: Collection[int] = ()) -> None:
        self.counts: Counts = np.zeros((classes, classes), dtype=np.int64)
        self.ignore = np.array(sorted(ignore), dtype=np.int64)
        self.scored = np.setdiff1d(np.arange(classes), self.ignore)
        self._of_images: list[npt.NDArray[np.int32]] = []

    def add(self, truth: npt.NDArray[np.integer], prediction: npt.NDArray[np.integer]) -> None:
        """Count pixels of images (B, H, W) or of one (H, W), predictions below C."""
        images = (truth, prediction) if truth.ndim == 3 else (truth[None], prediction[None])
        for true, predicted in zip(*images, strict=True):
            counts = tabulate(true, predicted, self.counts.shape, self.ignore)
            self.counts += counts
            self._of_images.append(np.stack([np.diagonal(counts), counts.sum(1), counts.sum(0)]).astype(np.int32))

    @property
    def of_images(self) -> npt.NDArray[np.int32]:
        """Hits, true and predicted pixels of each image by class: (n, 3, C), in the order they were added."""
        return np.stack(self._of_images)

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """IoU of each class (C,); NaN where a class is ignored or neither in the truth nor in the prediction."""
        return iou_of(np.diagonal(self.counts), self.counts.sum(1), self.counts.sum(0), self.scored)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that have one; 0 where none has."""
        iou = self.iou
        return float(np.nanmean(iou)) if not np.isnan(iou).all() else 0.0

    @property
    def miou_absent_zero(self) -> float:
        """Mean IoU over all scored classes, an absent one counting 0."""
        return float(np.nan_to_num(self.iou[self.scored]).mean())

    @property
    def miou_constant(self) -> float:
        """`miou` of giving every pixel the commonest true class: what an answer reaches that sees nothing."""
        there = self.counts.sum(1)
        return float(there.max() / max(1, there.sum()) / max(1, np.count_nonzero(there)))

    @property
    def pixel_accuracy(self) -> float:
        """Share of the scored pixels that have their class."""
        return float(np.trace(self.counts) / max(1, self.counts.sum()))


def iou_of(
    hit: npt.NDArray[Any], true: npt.NDArray[Any], predicted: npt.NDArray[Any], scored: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return IoU (..., C) of counts (..., C); NaN where a class is not `scored` or the union is empty."""
    union = true + predicted - hit
    iou = np.where(union > 0, hit / np.maximum(union, 1), np.nan)
    barred = np.setdiff1d(np.arange(hit.shape[-1]), scored)
    iou[..., barred] = np.nan
    return iou


def tabulate(
    truth: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    shape: tuple[int, ...],
    ignore: npt.NDArray[np.int64],
) -> Counts:
    """Return counts `shape` = (true classes, predictions) of pixels whose truth is not in `ignore`."""
    true, predicted = truth.ravel().astype(np.int64), prediction.ravel().astype(np.int64)
    kept = ~np.isin(true, ignore)
    pairs = true[kept] * shape[1] + predicted[kept]
    return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
