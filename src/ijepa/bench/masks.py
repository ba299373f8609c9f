"""CPU time of drawing masks and packing them, which the loader's processes do in addition to decoding."""

import time
from typing import Any

import numpy as np
import torch

from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.masking.packing import pack

GOAL_MS = 10.0
"""Time for the masks of 256 images that keeps them small next to decoding."""


def bench_masks(*, images: int = 256, grid: tuple[int, int] = (14, 14), repeats: int = 20) -> dict[str, Any]:
    """Measure drawing the masks of `images` images, and packing their sequences; medians over `repeats` draws."""
    rule, pixels = MaskRule(), torch.empty(images, 0)
    seconds = np.zeros((repeats + 1, 2))
    for turn in range(repeats + 1):
        start = time.process_time()
        masks = draw_masks(rule, grid, 0, np.arange(turn * images, (turn + 1) * images))
        drawn = time.process_time()
        pack(masks, pixels, images)
        seconds[turn] = drawn - start, time.process_time() - drawn
    masks_ms, packing_ms = (1e3 * np.median(seconds[1:], axis=0)).tolist()  # the first turn warms up
    settings = {"images": images, "grid": list(grid), "repeats": repeats}
    return {**settings, "masks_ms": masks_ms, "packing_ms": packing_ms, "goal_ms": GOAL_MS}
