"""Arrays behind the pictures of patch features: principal components as colors, and segmentation without training.

A principal component has no sign of its own, so the signs are fixed by a rule, and the same features give the same
colors: the first component is negative where the borders of the images are, the others are positive where their
largest loading is.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ijepa.data.loading.crop import Interpolation
from ijepa.data.sources.base import Source
from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.features.sampling import choose
from ijepa.evaluation.segmentation.clustering import assign_classes, collect, hungarian, kmeans, reduce_features
from ijepa.evaluation.segmentation.dataset import Labels, SegmentationDataset, find_classes
from ijepa.evaluation.segmentation.label_map import Rgb
from ijepa.evaluation.segmentation.patch_bank import PatchBank
from ijepa.evaluation.segmentation.retrieval import Distance
from ijepa.report.run_images import SEED
from ijepa.utils.errors import UserError
from ijepa.utils.random import Stream, random_bits

_MIN_FOREGROUND = 16
_TAIL = 0.01
_ROUNDING = 1e-6
"""Relative difference of two numbers that rounding alone can make."""


def pca_rgb(features: Tensor, grid: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Return colors (n, gh, gw, 3) in [0, 1] for patch features (n, N, D), jointly over the images.

    The first component over all patches separates foreground from background. The background is the side on which the
    borders of the images are on average, and is black. A second PCA over the foreground patches gives red, green and
    blue, each scaled from its 1st to its 99th percentile. If hardly any patch is foreground, all patches are.
    """
    flat = features.flatten(0, 1).double()  # (n * N, D)
    flat = flat - flat.mean(0)
    first = (flat @ _components(flat, 1)).reshape(-1, *grid)  # (n, gh, gw)
    border = torch.ones(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    if float(first[:, border].mean()) > _ROUNDING * float(first.abs().max()):
        first = -first
    foreground = (first > 0).flatten()
    if int(foreground.sum()) < _MIN_FOREGROUND:
        foreground = torch.ones_like(foreground)
    centered = flat[foreground] - flat[foreground].mean(0)
    scores = centered @ _components(centered, 3)
    sample = scores[:: -(-len(scores) // 1_000_000)]  # torch.quantile takes at most 16 million numbers
    low, high = (torch.quantile(sample, share, dim=0) for share in (_TAIL, 1 - _TAIL))
    scaled = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colors = torch.zeros(len(flat), 3, dtype=torch.float64)
    colors[foreground, : scaled.shape[1]] = scaled
    return colors.reshape(-1, *grid, 3).float().numpy()


def _components(centered: Tensor, count: int) -> Tensor:
    """Return the leading directions (D, count) of centered rows (n, D), each with a positive largest loading.

    If the magnitudes of several loadings differ by rounding only, the first of them is the positive one.
    """
    leading = torch.linalg.eigh(centered.T @ centered)[1].flip(1)[:, :count]
    size = leading.abs()
    largest = leading.gather(0, (size >= (1 - _ROUNDING) * size.amax(0)).int().argmax(0, keepdim=True))
    return leading * largest.sign()


@dataclass(frozen=True)
class SegmentationSettings:
    """How images are segmented.

    Attributes:
        image_size, interpolation: side in pixels to which images are resized, and how.
        k, distance: of the nearest patches.
        classes: number of mask labels; `find_classes` counts them if None.
        ignore: labels that are not scored.
        labels: label map of the masks; the sets' own if None.
        support: number of annotated images that are searched.
        others: number of images to which the clusters are fitted, in addition to those shown.
    """

    image_size: int
    interpolation: Interpolation = "bilinear"
    k: int = 10
    distance: Distance = "cosine"
    classes: int | None = None
    ignore: tuple[int, ...] = (255,)
    labels: str | None = None
    support: int = 200
    others: int = 100


@dataclass(frozen=True)
class SegmentedImages:
    """Images (n, S, S, 3) uint8 with three kinds of masks (n, S, S) of class labels.

    Attributes:
        images: the images.
        truth: their masks; only these have `ignore` labels.
        retrieved: by nearest patches of annotated images (level 1).
        clustered: by k-means (level 0).
        classes: the names, with the background first if the set's names leave it out.
        palette: the set's own color of every class; empty if it has none.
    """

    images: npt.NDArray[np.uint8]
    truth: Labels
    retrieved: Labels
    clustered: Labels
    classes: tuple[str, ...]
    palette: tuple[Rgb, ...] = ()


def segment(
    encoder: PatchEncoder, train: Source, test: Source, shown: Sequence[int], settings: SegmentationSettings
) -> SegmentedImages:
    """Segment the images `shown` of `test` by both methods that train nothing; masks of `train` are searched.

    Raises:
        UserError: a mask is missing or has a label out of range, or the patch size does not divide the image size.
        RunError: an image cannot be decoded, or features are not finite.
    """
    train.require_masks("--train")
    test.require_masks("--test")
    size = settings.image_size
    if size % encoder.patch_size:
        raise UserError("--image-size", f"patches of {encoder.patch_size} do not divide {size} pixels")
    sources = {"--train": train, "--test": test}
    known = find_classes(sources, settings.classes, settings.ignore, settings.labels)
    wanted = np.asarray(shown, dtype=np.int64)
    more = np.setdiff1d(choose(len(test), settings.others, SEED), wanted)
    bank_images, fitted, pictured = (
        SegmentationDataset(source, chosen, flag, known, size, size, settings.interpolation)
        for source, chosen, flag in (
            (train, choose(len(train), settings.support, SEED), "--train"),
            (test, np.concatenate([wanted, more]), "--test"),
            (test, wanted, "--test"),
        )
    )
    features, truth = collect(encoder, fitted, 32)
    bank = PatchBank(encoder, bank_images, images=len(bank_images), seed=SEED)
    retrieved = bank.masks(features[: len(wanted)], settings.k, settings.distance)
    side = size // encoder.patch_size
    state = int(random_bits(SEED, Stream.EVALUATION, [0], 1)[0, 0])
    assigned = kmeans(reduce_features(features, 50), known.scored, restarts=2, iterations=100, state=state)
    clustered = assign_classes(assigned.reshape(-1, side, side), truth, known, hungarian)[: len(wanted)]
    pixels = next(pictured.batches(len(wanted)))[0]
    images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    label_map = known.maps.get("--test")
    palette = own_palette(test.mask(int(wanted[0])), known.count) if label_map is None else label_map.palette
    return SegmentedImages(images, truth[: len(wanted)], retrieved, clustered, known.names, palette)


def own_palette(mask: bytes | None, count: int) -> tuple[Rgb, ...]:
    """Return the first `count` colors of a palette PNG; none for other masks, and if two of the colors are equal."""
    if mask is None:
        return ()
    with Image.open(io.BytesIO(mask)) as image:
        values = (image.getpalette("RGB") or []) if image.mode == "P" else []
    found = tuple((values[i], values[i + 1], values[i + 2]) for i in range(0, min(len(values), 3 * count), 3))
    return found if len(set(found)) == count else ()
