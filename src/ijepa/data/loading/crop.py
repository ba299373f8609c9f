"""Which box of an image is looked at, and that box resized: RandomResizedCrop, as the field means it.

The box follows torchvision's `RandomResizedCrop` in its distribution: a share of the area uniform in `scale`, an
aspect ratio log-uniform in `ratio`, sides rounded, ten attempts to fit it into the image, and then the largest
central box of an allowed aspect. It draws from words it is given, so that a crop is a function of (seed, position)
and of the image's size.

The resize is torch's antialiased bilinear filter on bytes: it agrees with Pillow's to a level and takes a quarter of
its time. Filtering stops at the box's edge, as in cropping first and resizing after.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ijepa.utils.random import Words

Interpolation = Literal["bilinear", "bicubic"]

ATTEMPTS = 10
WORDS = 4 * ATTEMPTS
"""Random words a crop takes: area, aspect, top and left for each attempt."""

_UNIT = 2.0**-32


class Box(NamedTuple):
    """A rectangle of whole pixels within an image."""

    top: int
    left: int
    height: int
    width: int


def random_resized_crop_box(
    words: Words, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Return a random box within an image of `height` x `width` pixels.

    `words` (40,) uint32 are the draws; `scale` bounds the box's share of the area, `ratio` its width / height.
    """
    for attempt in range(0, WORDS, 4):
        share, aspect, down, across = words[attempt : attempt + 4].tolist()
        h, w = _drawn_sides(share, aspect, height * width, scale, ratio)
        if 0 < w <= width and 0 < h <= height:
            return _placed(h, w, height, width, down, across)
    return _central(height, width, min(max(width / height, ratio[0]), ratio[1]))


def clamped_crop_box(
    words: Words, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Return the box that `random_resized_crop_box` tries first, its sides cut to the image's where they are longer.

    It is the rule of MAE's linear probe (arXiv 2111.06377, `util/crop.py`). Crops are larger on average, because none
    is drawn again. Only the first 4 words are used.
    """
    share, aspect, down, across = words[:4].tolist()
    h, w = _drawn_sides(share, aspect, height * width, scale, ratio)
    return _placed(max(1, min(h, height)), max(1, min(w, width)), height, width, down, across)


def hull(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that holds them all."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    return Box(top, left, bottom - top, right - left)


def center_crop_box(height: int, width: int, size: tuple[int, int], fraction: float = 0.875) -> Box:
    """Return the central box of `size`'s shape that takes `fraction` of the largest such box, a side.

    With a square size and .875 it is what resizing the short side to 256 and cropping 224 looks at.
    """
    return _central(height, width, size[1] / size[0], fraction)


def crop_resize(
    image: npt.NDArray[np.uint8],
    box: Box,
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    *,
    out: npt.NDArray[np.uint8] | None = None,
) -> Tensor:
    """Return the box of an image (H, W, 3) uint8 as (3, h, w) uint8, `size` = (h, w), antialiased.

    Bicubic agrees with Pillow's to two levels; what it overshoots is clamped to bytes, after each axis as there.
    With `out` (3, h, w) uint8 it is written there, and what is returned shares its memory.
    """
    top, left, height, width = box
    # As four dense dimensions with the channels last, or torch takes its way for strided planes: half as long again.
    # numpy's views and copies, because torch's take twenty microseconds more when a decoder has just filled the caches.
    crop = np.ascontiguousarray(image[top : top + height, left : left + width])
    view = torch.from_numpy(crop.reshape(1, height, width, 3).transpose(0, 3, 1, 2))
    if (height, width) != size:
        view = interpolate(view, size, mode=interpolation, antialias=True)
    if out is None:
        return view[0].contiguous()
    np.copyto(out, view.numpy()[0])
    return torch.from_numpy(out)


def _drawn_sides(
    share: int, aspect: int, area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    """Return height and width by a word for the share of the area and one for the aspect ratio."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    target = area * (scale[0] + (scale[1] - scale[0]) * share * _UNIT)
    shape = math.exp(low + (high - low) * aspect * _UNIT)
    return round(math.sqrt(target / shape)), round(math.sqrt(target * shape))


def _placed(h: int, w: int, height: int, width: int, down: int, across: int) -> Box:
    """Return a box of `h` x `w` within an image, placed by a word for each axis."""
    return Box((height - h + 1) * down >> 32, (width - w + 1) * across >> 32, h, w)


def _central(height: int, width: int, aspect: float, fraction: float = 1.0) -> Box:
    """Return the central box of width / height = `aspect` whose sides are `fraction` of the largest that fits."""
    h, w = (height, height * aspect) if height * aspect <= width else (width / aspect, width)
    h, w = max(1, min(height, round(h * fraction))), max(1, min(width, round(w * fraction)))
    return Box((height - h) // 2, (width - w) // 2, h, w)
