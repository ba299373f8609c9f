"""What a report's pictures of features show, as arrays; nothing is drawn here.

Principal components have no sign of their own. All signs are fixed by rule, so that the same features give the same
colours: the first component is positive where the images' borders are not, the others where their largest loading is.
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
from ijepa.evaluation.features.extract import Encoder
from ijepa.evaluation.features.sampling import choose
from ijepa.evaluation.segmentation.clustering import collect, hungarian, kmeans, named, reduced
from ijepa.evaluation.segmentation.dataset import Annotated, Labels, find_classes
from ijepa.evaluation.segmentation.label_map import Rgb
from ijepa.evaluation.segmentation.patch_bank import PatchBank
from ijepa.evaluation.segmentation.retrieval import Distance, search
from ijepa.utils.errors import UserError
from ijepa.utils.random import Stream, random_bits

_LEAST_FOREGROUND = 16
_TAIL = 0.01
_TIE = 1e-6
"""Relative difference below which two numbers differ by rounding only."""


def pca_rgb(features: Tensor, grid: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Return colours (n, gh, gw, 3) in [0, 1] for patch features (n, N, D), jointly over the images.

    The first component over all patches parts foreground from ground: ground is the side on which the images'
    borders lie on average, and is black. A second PCA over all foreground patches gives red, green and blue, each
    stretched from its 1st to its 99th percentile. Where hardly any patch is foreground, all are coloured.
    """
    flat = features.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    first = (flat @ _components(flat, 1)).reshape(-1, *grid)
    border = torch.ones(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    if float(first[:, border].mean()) > _TIE * float(first.abs().max()):
        first = -first
    foreground = (first > 0).flatten()
    if int(foreground.sum()) < _LEAST_FOREGROUND:
        foreground = torch.ones_like(foreground)
    chosen = flat[foreground] - flat[foreground].mean(0)
    scores = chosen @ _components(chosen, 3)
    low, high = (torch.quantile(_thinned(scores), share, dim=0) for share in (_TAIL, 1 - _TAIL))
    colours = torch.zeros(len(flat), 3, dtype=torch.float64)
    shown = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colours[foreground, : shown.shape[1]] = shown
    return colours.reshape(-1, *grid, 3).float().numpy()


def nearest(train_pooled: Tensor, query_pooled: Tensor, k: int) -> npt.NDArray[np.int64]:
    """Return the numbers of the k rows of `train_pooled` (m, D) most similar by cosine to each query (q, D): (q, k)."""
    return search(query_pooled.float(), train_pooled.float(), k, "cosine").numpy()


@dataclass(frozen=True)
class Panels:
    """Images beside what was said of them; masks hold class numbers, `ignore` labels in `truth` alone.

    Attributes:
        images: (n, S, S, 3) uint8.
        truth, retrieval, clusters: (n, S, S) masks: true, by nearest neighbours (level 1), by clusters (level 0).
        classes: their names, ground first where the set's names leave it out.
    """

    images: npt.NDArray[np.uint8]
    truth: Labels
    retrieval: Labels
    clusters: Labels
    classes: tuple[str, ...]
    palette: tuple[Rgb, ...] = ()
    """The set's own colour of every class; empty where it has none."""


def segment(
    encoder: Encoder,
    train: Source,
    test: Source,
    shown: Sequence[int],
    *,
    image_size: int,
    interpolation: Interpolation = "bilinear",
    support: int = 200,
    clustered: int = 100,
    k: int = 10,
    distance: Distance = "cosine",
    classes: int | None = None,
    ignore: tuple[int, ...] = (255,),
    labels: str | None = None,
    seed: int = 0,
) -> Panels:
    """Segment a few images of `test` by both methods that train nothing.

    Args:
        encoder: makes the patch features.
        train: its masks are looked up, `support` of its images.
        test: where the images come from; clusters are fitted on them and on `clustered` others.
        shown: sample numbers in `test`.
        image_size, interpolation: side in pixels to which images are resized, and how.
        support, clustered: numbers of images, chosen by `seed`.
        k, distance: of the retrieval.
        classes: number of mask labels; what `find_classes` finds if None.
        ignore: labels that say nothing.
        labels: label map of the masks; the sets' own if None.
        seed: chooses images and k-means' start.

    Raises:
        UserError: masks that are missing or hold a label out of range, or a size that the patches do not divide.
        RunError: an image cannot be decoded, or features are not finite.
    """
    train.require_masks("--train")
    test.require_masks("--test")
    if image_size % encoder.patch_size:
        raise UserError("--image-size", f"patches of {encoder.patch_size} do not divide {image_size} pixels")
    known = find_classes([(train, "--train"), (test, "--test")], classes, ignore, labels)
    wanted = np.asarray(shown, dtype=np.int64)
    others = np.setdiff1d(choose(len(test), clustered, seed), wanted)
    bank_images, samples, pictured = (
        Annotated(source, chosen, flag, image_size, image_size, interpolation=interpolation)
        for source, chosen, flag in (
            (train, choose(len(train), support, seed), "--train"),
            (test, np.concatenate([wanted, others]), "--test"),
            (test, wanted, "--test"),
        )
    )
    features, truth = collect(encoder, samples, known, 32)
    bank = PatchBank(encoder, bank_images, known, images=len(bank_images), seed=seed)
    found = bank.masks(features[: len(wanted)], k, distance)
    side = image_size // encoder.patch_size
    state = int(random_bits(seed, Stream.EVALUATION, [0], 1)[0, 0])
    assigned = kmeans(reduced(features, 50), known.scored, restarts=2, iterations=100, state=state)
    clusters = named(assigned.reshape(-1, side, side), truth, known, hungarian)
    pixels = next(pictured.batches(len(wanted), known))[0]
    images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    labels_of = known.maps.get("--test")
    palette = own_palette(test.mask(int(wanted[0])), known.count) if labels_of is None else labels_of.palette
    return Panels(images, truth[: len(wanted)], found, clusters[: len(wanted)], known.names, palette)


def own_palette(mask: bytes | None, count: int) -> tuple[Rgb, ...]:
    """Return the first `count` colours of a palette PNG; empty of another mask, or where two of them are the same."""
    if mask is None:
        return ()
    with Image.open(io.BytesIO(mask)) as image:
        values = (image.getpalette("RGB") or []) if image.mode == "P" else []
    found = tuple((values[i], values[i + 1], values[i + 2]) for i in range(0, min(len(values), 3 * count), 3))
    return found if len(set(found)) == count else ()


def _components(centred: Tensor, count: int) -> Tensor:
    """Return the leading directions (D, count) of centred rows (n, D), the largest loading of each positive.

    Of loadings that differ in magnitude by rounding only, it is the first.
    """
    leading = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :count]
    size = leading.abs()
    largest = leading.gather(0, (size >= (1 - _TIE) * size.amax(0)).int().argmax(0, keepdim=True))
    return leading * largest.sign()


def _thinned(scores: Tensor, most: int = 1_000_000) -> Tensor:
    """Return at most `most` rows, evenly spaced: torch's quantile takes 16 million numbers at most."""
    return scores[:: -(-len(scores) // most)]
