"""Choose a box of an image and resize it: RandomResizedCrop and center crop.

The random box has the distribution of torchvision's `RandomResizedCrop`: a share of the area uniform in `scale`, an
aspect ratio log-uniform in `ratio`, rounded sides, ten attempts to fit it into the image, and then the largest central
box of an allowed aspect ratio. The random words are given by the caller, so a crop is a function of (seed, position)
and of the size of the image.

The resize is torch's antialiased bilinear filter on uint8: it differs from Pillow's by at most one level and takes a
quarter of its time. The filter reads nothing outside the box, as if the image was cropped first.
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
"""Number of random words for a crop: area, aspect ratio, top and left for each attempt."""

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

    Args:
        words: (40,) uint32, the random draws.
        height, width: size of the image.
        scale: bounds of the box's share of the area.
        ratio: bounds of its width / height.
    """
    for attempt in range(0, WORDS, 4):
        area, aspect, top, left = words[attempt : attempt + 4].tolist()
        h, w = _sides(area, aspect, height * width, scale, ratio)
        if 0 < w <= width and 0 < h <= height:
            return _place(h, w, height, width, top, left)
    # As torchvision: the largest central box, with the image's own aspect ratio if that is allowed.
    return _central(height, width, min(max(width / height, ratio[0]), ratio[1]))


def clamped_crop_box(
    words: Words, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Return the first attempt of `random_resized_crop_box`, with longer sides clamped to those of the image.

    This is the rule of MAE's linear probe (arXiv 2111.06377, `util/crop.py`). Crops are larger on average, because none
    is drawn again. Only the first 4 words are used.
    """
    area, aspect, top, left = words[:4].tolist()
    h, w = _sides(area, aspect, height * width, scale, ratio)
    return _place(max(1, min(h, height)), max(1, min(w, width)), height, width, top, left)


def hull(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that contains all boxes."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    return Box(top, left, bottom - top, right - left)


def center_crop_box(height: int, width: int, size: tuple[int, int], fraction: float = 0.875) -> Box:
    """Return the central box with the aspect ratio of `size`, whose sides are `fraction` of the largest such box.

    With a square size and .875, this is the region of "resize the short side to 256, crop 224".
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
    """Resize the box of an image, antialiased. Bicubic differs from Pillow's by at most two levels.

    Args:
        image: (H, W, 3) uint8.
        box: the part of the image.
        size: (h, w) of the result.
        interpolation: the filter.
        out: (3, h, w) uint8; the result is written there if it is given.

    Returns:
        (3, h, w) uint8; it shares the memory of `out`.
    """
    top, left, height, width = box
    # torch's fast path needs four dense dimensions with the channels last; the path for strided planes takes half as
    # long again. The views and copies are numpy's, because torch's take 20 microseconds more after a decoder has filled
    # the CPU caches.
    crop = np.ascontiguousarray(image[top : top + height, left : left + width])
    view = torch.from_numpy(crop.reshape(1, height, width, 3).transpose(0, 3, 1, 2))  # (1, 3, H, W)
    if (height, width) != size:
        view = interpolate(view, size, mode=interpolation, antialias=True)
    if out is None:
        return view[0].contiguous()
    np.copyto(out, view.numpy()[0])
    return torch.from_numpy(out)


def _sides(
    area_word: int, aspect_word: int, area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    """Return height and width, drawn with one word for the share of the area and one for the aspect ratio."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    target = area * (scale[0] + (scale[1] - scale[0]) * area_word * _UNIT)
    aspect = math.exp(low + (high - low) * aspect_word * _UNIT)
    return round(math.sqrt(target / aspect)), round(math.sqrt(target * aspect))


def _place(h: int, w: int, height: int, width: int, top_word: int, left_word: int) -> Box:
    """Return a box of `h` x `w` within an image, placed with one word for each axis."""
    # Integers only, so that the place does not depend on the rounding of floats.
    return Box((height - h + 1) * top_word >> 32, (width - w + 1) * left_word >> 32, h, w)


def _central(height: int, width: int, aspect: float, fraction: float = 1.0) -> Box:
    """Return the central box of width / height = `aspect` whose sides are `fraction` of the largest that fits."""
    h, w = (height, height * aspect) if height * aspect <= width else (width / aspect, width)
    h, w = max(1, min(height, round(h * fraction))), max(1, min(width, round(w * fraction)))
    return Box((height - h) // 2, (width - w) // 2, h, w)
