"""Segmentation by clusters of patch features: labels only score.

Level 0: features of the evaluation images are standardised, reduced by PCA and clustered; classes enter afterwards,
when clusters are matched to them. With as many clusters as classes the match is one to one and maximises the summed
IoU (Hungarian method); with many more, each cluster takes the class it is most often part of (precision), which asks
whether features separate the classes at all. The protocol is that of Leopart (Ziegler and Asano, arXiv 2204.13101).
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.evaluation.features.extract import Encoder
from ijepa.evaluation.metrics.iou import Confusion, Counts, tabulate
from ijepa.evaluation.segmentation.dataset import Annotated, Classes, Labels, nearest_resize, patch_features
from ijepa.utils.errors import UserError

_ROWS = 65536


def require_extra() -> None:
    """Refuse where the packages that this room's level 0 needs are not installed, before anything is computed."""
    for module, package in (("sklearn", "scikit-learn"), ("scipy", "scipy"), ("threadpoolctl", "threadpoolctl")):
        if find_spec(module) is None:
            raise UserError(package, "is not installed", "pip install 'ijepa-pretrain[evaluation]'")


def collect(encoder: Encoder, samples: Annotated, classes: Classes, batch: int) -> tuple[Tensor, Labels]:
    """Return all patch features (n, N, D) float32 and masks (n, M, M) uint8 or int32: the memory of level 0."""
    features, masks, done = torch.empty(0), np.empty(0, dtype=np.int64), 0
    largest = max(classes.count, *classes.ignore) if classes.ignore else classes.count
    for patches, some in patch_features(encoder, samples, classes, batch):
        if not features.numel():
            features = torch.empty(len(samples), *patches.shape[1:])
            masks = np.empty((len(samples), *some.shape[1:]), dtype=np.uint8 if largest <= 255 else np.int32)
        features[done : done + len(patches)] = patches
        masks[done : done + len(patches)] = some
        done += len(patches)
    return features, masks


def reduced(features: Tensor, components: int) -> npt.NDArray[np.float32]:
    """Standardise features (n, N, D), in place, and return their principal components (n * N, components)."""
    flat = features.flatten(0, 1)
    mean, scale = standardise(flat)
    flat.sub_(mean).mul_(scale)
    return principal(flat, components).numpy()


class Scaler:
    """Running mean and deviation of every channel, in float64; features come batch by batch and are not kept."""

    def __init__(self) -> None:
        self.count = 0
        self._mean, self._square = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take features (n, D) into account."""
        for rows in features.split(_ROWS):
            mean = rows.mean(0, dtype=torch.float64)
            square = (rows.double() - mean).square().sum(0)
            before, self.count = self.count, self.count + len(rows)
            away = mean - self._mean
            self._mean = self._mean + away * (len(rows) / self.count)
            self._square = self._square + square + away.square() * (before * len(rows) / self.count)

    def figures(self) -> tuple[Tensor, Tensor]:
        """Return mean and 1 / deviation (D,) float32; constant channels get 1."""
        deviation = (self._square / self.count).sqrt()
        deviation[deviation <= 1e-7 * (1 + self._mean.abs())] = 1.0
        return self._mean.float(), (1 / deviation).float()


def standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / deviation (D,) float32 of features (n, D); constant channels get 1."""
    scaler = Scaler()
    scaler.add(features)
    return scaler.figures()


def principal(features: Tensor, components: int) -> Tensor:
    """Project features (n, D) with mean 0 on their leading directions: (n, min(components, D))."""
    covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for rows in features.split(_ROWS):
        covariance += (rows.T @ rows).double()
    leading = torch.linalg.eigh(covariance)[1].flip(1)[:, :components].float()
    return features @ leading


def kmeans(features: npt.NDArray[np.float32], clusters: int, *, restarts: int, iterations: int, state: int) -> Labels:
    """Cluster features (n, D) by k-means++ and Lloyd, the best of `restarts`: (n,) in [0, clusters).

    One thread: with several, scikit-learn adds in any order and two runs may differ. Features with fewer different
    rows than `clusters`, as a collapsed encoder makes them, leave clusters empty: an answer, and no cause for warning.
    """
    require_extra()
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    model = KMeans(min(clusters, len(features)), n_init=restarts, max_iter=iterations, random_state=state)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit_predict(features).astype(np.int64)


def hungarian(counts: Counts) -> Labels:
    """Match clusters to classes one to one, maximising the sum of IoU; counts (classes, clusters) -> (clusters,).

    Clusters beyond the number of classes get the class they overlap most.
    """
    require_extra()
    from scipy.optimize import linear_sum_assignment

    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    cost = 1 - counts / np.maximum(union, 1)
    matched = by_precision(counts)
    rows, columns = linear_sum_assignment(cost)
    matched[columns] = rows
    return matched


def by_precision(counts: Counts) -> Labels:
    """Give each cluster the class of most of its pixels, the lowest of equals: counts (classes, clusters)."""
    return counts.argmax(0)


def named(assigned: Labels, masks: Labels, classes: Classes, match: Callable[[Counts], Labels]) -> Labels:
    """Give clusters (n, g, g) of patches their classes, matched by `match` on masks (n, M, M): (n, M, M)."""
    ignore = np.array(classes.ignore, dtype=np.int64)
    scored = np.setdiff1d(np.arange(classes.count), ignore)
    clusters = nearest_resize(assigned, masks.shape[-2:])
    counts = tabulate(masks, clusters, (classes.count, int(assigned.max()) + 1), ignore)[scored]
    return scored[match(counts)][clusters]


def scored(assigned: Labels, masks: Labels, classes: Classes, match: Callable[[Counts], Labels]) -> Confusion:
    """Return the confusion matrix of clusters after `named`."""
    confusion = Confusion(classes.count, classes.ignore)
    confusion.add(masks, named(assigned, masks, classes, match))
    return confusion
