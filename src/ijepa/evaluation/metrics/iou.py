"""Metrics of a segmentation, from one confusion matrix over the whole data set.

IoU is a ratio of sums over the data set, not a mean of ratios over images. So only counts are kept, and for each image
the three sums that an IoU needs, for the bootstrap of its interval (`bootstrap`). A class that is neither in the truth
nor in the prediction has no IoU. `miou` leaves it out of the mean, as scikit-learn does; `miou_absent_zero` counts it
as 0, as some tools do: a perfect prediction with one of 21 classes absent then has 20/21. A class that is predicted but
not in the truth has IoU 0 in both.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


class Confusion:
    """Counts (C, C) of pixels by true class (row) and predicted class (column), without pixels of ignored labels.

    Args:
        classes: C; true labels are below C or ignored.
        ignore: labels of pixels that are not scored. Those below C are left out of means as well.
    """

    def __init__(self, classes: int, ignore: Collection[int] = ()) -> None:
        self.counts: Counts = np.zeros((classes, classes), dtype=np.int64)
        self.ignore = np.array(sorted(ignore), dtype=np.int64)
        self.scored = np.setdiff1d(np.arange(classes), self.ignore)
        self._of_images: list[npt.NDArray[np.int32]] = []

    def add(self, truth: npt.NDArray[np.integer], prediction: npt.NDArray[np.integer]) -> None:
        """Count the pixels of images (B, H, W) or of one image (H, W); predictions are below C."""
        images = (truth, prediction) if truth.ndim == 3 else (truth[None], prediction[None])
        for true, predicted in zip(*images, strict=True):
            counts = tabulate(true, predicted, self.counts.shape, self.ignore)
            self.counts += counts
            self._of_images.append(np.stack([np.diagonal(counts), counts.sum(1), counts.sum(0)]).astype(np.int32))

    @property
    def of_images(self) -> npt.NDArray[np.int32]:
        """Correct, true and predicted pixels of each image by class: (n, 3, C), in the order of `add`."""
        return np.stack(self._of_images)

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """IoU of each class (C,); NaN if a class is ignored, or neither in the truth nor in the prediction."""
        return iou_of(np.diagonal(self.counts), self.counts.sum(1), self.counts.sum(0), self.scored)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that have one; 0 if none has."""
        iou = self.iou
        return float(np.nanmean(iou)) if not np.isnan(iou).all() else 0.0

    @property
    def miou_absent_zero(self) -> float:
        """Mean IoU over all scored classes; that of an absent class is 0."""
        return float(np.nan_to_num(self.iou[self.scored]).mean())

    @property
    def miou_constant(self) -> float:
        """`miou` of predicting the most frequent true class for all pixels, which needs no image."""
        true = self.counts.sum(1)
        # Its IoU is its share of the pixels; all other classes that occur have IoU 0.
        return float(true.max() / max(1, true.sum()) / max(1, np.count_nonzero(true)))

    @property
    def pixel_accuracy(self) -> float:
        """Share of the scored pixels whose class is predicted."""
        return float(np.trace(self.counts) / max(1, self.counts.sum()))


def iou_of(
    hit: npt.NDArray[Any], true: npt.NDArray[Any], predicted: npt.NDArray[Any], scored: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return IoU (..., C) of counts (..., C); NaN if a class is not in `scored` or its union is empty."""
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
    """Return counts of `shape` (true classes, predicted classes) of the pixels whose true label is not in `ignore`."""
    true, predicted = truth.ravel().astype(np.int64), prediction.ravel().astype(np.int64)
    kept = ~np.isin(true, ignore)
    pairs = true[kept] * shape[1] + predicted[kept]  # index of the cell in the flattened matrix
    return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
