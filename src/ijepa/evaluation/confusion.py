"""Scores of a segmentation, from one confusion matrix over the whole data set.

IoU is a ratio of sums over the data set, not a mean of ratios over images, so counts are all that is kept. A class
that is neither in the truth nor in the prediction has no IoU. `miou` leaves it out of the mean, as scikit-learn
does; `miou_absent_zero` counts it as 0, as some tools do: a perfect prediction with one of 21 classes absent then
scores 20/21. A class that is predicted and not there has IoU 0 in both.
"""

from collections.abc import Collection

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

    def add(self, truth: npt.NDArray[np.integer], prediction: npt.NDArray[np.integer]) -> None:
        """Count pixels; both arrays have the same shape, predictions are below C."""
        self.counts += tabulate(truth, prediction, self.counts.shape, self.ignore)

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """IoU of each class (C,); NaN where a class is ignored or neither in the truth nor in the prediction."""
        hit = np.diagonal(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hit
        iou = np.full(len(hit), np.nan)
        there = self.scored[union[self.scored] > 0]
        iou[there] = hit[there] / union[there]
        return iou

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
