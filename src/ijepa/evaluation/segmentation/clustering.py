"""Segmentation by clusters of patch features, in which labels are only used for scoring.

Level 0: the features of the evaluation images are standardized, reduced by PCA and clustered; then the clusters are
matched to classes. With as many clusters as classes, the match is one to one and maximizes the sum of IoU (Hungarian
method). With many more clusters, each gets the class of most of its pixels (precision), which shows whether the
features separate the classes at all. The protocol is that of Leopart (Ziegler and Asano, arXiv 2204.13101).
"""

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.features.standardize import RunningMeanStd
from ijepa.evaluation.metrics.iou import Confusion, Counts, tabulate
from ijepa.evaluation.segmentation.dataset import Classes, Labels, SegmentationDataset, nearest_resize
from ijepa.utils.extras import require_extra

_ROWS = 65536


def require_clustering(what: str) -> None:
    """Refuse `what` if the packages of the extra `evaluation` are not installed, before anything is computed."""
    for module in ("sklearn", "scipy", "threadpoolctl"):
        require_extra(module, "evaluation", what)


def collect(encoder: PatchEncoder, samples: SegmentationDataset, batch: int) -> tuple[Tensor, Labels]:
    """Return all patch features (n, N, D) float32 and masks (n, M, M) uint8 or int32."""
    patches = (samples.image_size // encoder.patch_size) ** 2
    features = torch.empty(len(samples), patches, encoder.embed_dim)
    small = max(samples.classes.count, *samples.classes.ignore, 0) <= 255
    masks = np.empty((len(samples), samples.mask_size, samples.mask_size), dtype=np.uint8 if small else np.int32)
    filled = 0
    for some, some_masks in samples.patch_features(encoder, batch):
        features[filled : filled + len(some)] = some
        masks[filled : filled + len(some)] = some_masks
        filled += len(some)
    return features, masks


def reduce_features(features: Tensor, components: int) -> npt.NDArray[np.float32]:
    """Standardize features (n, N, D), in place, and return their principal components (n * N, components)."""
    flat = features.flatten(0, 1)
    scaler = RunningMeanStd()
    scaler.add(flat)
    mean, std = scaler.mean_and_std()
    flat.sub_(mean.float()).mul_((1 / std).float())
    return principal(flat, components).numpy()


def principal(features: Tensor, components: int) -> Tensor:
    """Project features (n, D) with mean 0 on their leading directions: (n, min(components, D))."""
    covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for rows in features.split(_ROWS):
        covariance += (rows.T @ rows).double()
    # eigh sorts eigenvalues in ascending order.
    leading = torch.linalg.eigh(covariance)[1].flip(1)[:, :components].float()
    return features @ leading


def kmeans(features: npt.NDArray[np.float32], clusters: int, *, restarts: int, iterations: int, state: int) -> Labels:
    """Return the cluster (n,) of each of features (n, D) by k-means++ and Lloyd's algorithm, the best of `restarts`.

    Some clusters are empty if there are fewer distinct rows than clusters, as for a collapsed encoder.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    model = KMeans(min(clusters, len(features)), n_init=restarts, max_iter=iterations, random_state=state)
    # With several threads, the order of additions in scikit-learn varies, and two runs may differ.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit_predict(features).astype(np.int64)


def hungarian(counts: Counts) -> Labels:
    """Match clusters to classes one to one with the largest sum of IoU: counts (classes, clusters) -> (clusters,).

    Clusters in excess of the number of classes get the class with which they share the most pixels.
    """
    from scipy.optimize import linear_sum_assignment

    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    cost = 1 - counts / np.maximum(union, 1)
    matched = by_precision(counts)
    rows, columns = linear_sum_assignment(cost)
    matched[columns] = rows
    return matched


def by_precision(counts: Counts) -> Labels:
    """Return the class of most pixels of each cluster, the lowest of equals: counts (classes, clusters)."""
    return counts.argmax(0)


def assign_classes(assigned: Labels, masks: Labels, classes: Classes, match: Callable[[Counts], Labels]) -> Labels:
    """Return the class of each pixel (n, M, M), for clusters (n, g, g) of patches matched to masks (n, M, M)."""
    ignore = np.array(classes.ignore, dtype=np.int64)
    scored = np.setdiff1d(np.arange(classes.count), ignore)
    clusters = nearest_resize(assigned, masks.shape[-2:])
    counts = tabulate(masks, clusters, (classes.count, int(assigned.max()) + 1), ignore)[scored]
    return scored[match(counts)][clusters]


def cluster_confusion(
    assigned: Labels, masks: Labels, classes: Classes, match: Callable[[Counts], Labels]
) -> Confusion:
    """Return the confusion matrix of clusters after `assign_classes`."""
    confusion = Confusion(classes.count, classes.ignore)
    confusion.add(masks, assign_classes(assigned, masks, classes, match))
    return confusion
