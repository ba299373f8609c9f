"""Selection of images from a source, their pixels, and their patch features: evaluation without training.

Images are selected by (seed, Stream.EVALUATION), so that two encoders, or one encoder at two steps, see the same ones.
`crops` takes the largest center box of the required shape. An image that already has the required size is not changed.
"""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.loading.crop import center_crop_box, crop_resize
from ijepa.data.loading.decode import DecodeError, decode
from ijepa.data.sources.base import Source
from ijepa.evaluation.features.extract import PatchEncoder, device_of, require_finite
from ijepa.utils.errors import RunError
from ijepa.utils.random import Stream, randint, random_bits, uniform

Indices = npt.NDArray[np.int64]


def choose(total: int, count: int, seed: int) -> Indices:
    """Return `count` different sample numbers below `total`, ascending; all numbers if count >= total."""
    if count >= total:
        return np.arange(total)
    drawn = 2 * count
    while True:
        # The first `count` different numbers of one sequence: drawing more of it changes none of them.
        numbers = randint(random_bits(seed, Stream.EVALUATION, np.arange(drawn), 1)[:, 0], total)
        distinct, first = np.unique(numbers, return_index=True)
        if len(distinct) >= count:
            return np.sort(distinct[np.argsort(first)[:count]])
        drawn *= 2


def hold_out(
    indices: Indices, share: float, seed: int, labels: npt.NDArray[np.integer] | None = None
) -> npt.NDArray[np.bool_]:
    """Return which samples (n,) are held out to choose a setting. They are drawn by number, so order does not matter.

    Args:
        indices: sample numbers (n,).
        share: part of the samples to hold out; at least one sample is held out, and at least one is not.
        seed: seed of the draw.
        labels: classes (n,). If given, the same share of each class is held out, to within one image, and never the
            only image of a class.
    """
    draw = uniform(random_bits(seed, Stream.HOLD_OUT, indices, 1)[:, 0])
    count = min(len(indices) - 1, max(1, round(share * len(indices))))
    held = np.zeros(len(indices), dtype=np.bool_)
    if labels is None:
        held[np.argsort(draw, kind="stable")[:count]] = True
        return held
    _, class_number, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((draw, class_number))  # sorted by class, in drawn order within a class
    order = order[sizes[class_number[order]] > 1] if (sizes > 1).any() else order
    count = min(count, len(order) - 1)
    # Evenly spaced places in this order give each class its share, to within one image.
    held[order[np.arange(count) * len(order) // count]] = True
    return held


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size that is given as one side of a square or as both sides."""
    return (size, size) if isinstance(size, int) else size


def crops(source: Source, indices: Sequence[int] | Indices, size: tuple[int, int]) -> Tensor:
    """Return center crops (n, 3, h, w) uint8 of images.

    Raises:
        RunError: an image cannot be decoded; the line names it.
    """
    batch = torch.empty((len(indices), 3, *size), dtype=torch.uint8)
    for row, index in zip(batch, indices, strict=True):
        try:
            row.copy_(_crop(source, int(index), size))
        except DecodeError as error:
            raise RunError(f"{source.name(int(index))}: {error}") from error
    return batch


def readable_crops(source: Source, indices: Sequence[int] | Indices, size: tuple[int, int]) -> tuple[Tensor, Indices]:
    """Return center crops (n, 3, h, w) uint8 of images that can be decoded, and their numbers (n,).

    An image that cannot be decoded is replaced by the next one of the source that can be, and that is not in the batch
    yet. If none is left, n is smaller than the number of `indices`.

    Raises:
        RunError: no image of the source can be decoded.
    """
    taken, found = {int(index) for index in indices}, {}
    for first in map(int, indices):
        for index in (first, *((first + step) % len(source) for step in range(1, len(source)))):
            if index != first and index in taken:
                continue
            taken.add(index)
            with suppress(DecodeError):
                found[index] = _crop(source, index, size)
                break
    if not found:
        raise RunError(f"none of the {len(source)} images can be decoded, the first is {source.name(0)}")
    return torch.stack(list(found.values())), np.array(list(found), dtype=np.int64)


def _crop(source: Source, index: int, size: tuple[int, int]) -> Tensor:
    image = decode(source[index].image)
    height, width = image.shape[:2]
    return crop_resize(image, center_crop_box(height, width, size, fraction=1.0), size)


@torch.no_grad()
def encoded(encoder: PatchEncoder, pixels: Tensor) -> Tensor:
    """Return patch features (B, N, D) float32 on the CPU of pixels (B, 3, H, W), computed on the encoder's device.

    Raises:
        RunError: features that are not finite numbers.
    """
    return require_finite(encoder(pixels.to(device_of(encoder))).float().cpu())
