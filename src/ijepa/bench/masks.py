"""CPU time of drawing masks and packing them, which the loader's processes do beside decoding."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ijepa.masking.masks import MaskRule, draw_masks
from ijepa.masking.packing import pack
from ijepa.utils.environment import machine

GOAL_MS = 10.0


def bench_masks(
    *, images: int = 256, grid: tuple[int, int] = (14, 14), repeats: int = 20, echo: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure masks and packed sequences of `images` images; return the figures that are printed."""
    rule, pixels = MaskRule(), torch.empty(images, 0)
    seconds = np.zeros((repeats + 1, 2))
    for turn in range(repeats + 1):
        begun = time.process_time()
        masks = draw_masks(rule, grid, 0, np.arange(turn * images, (turn + 1) * images))
        drawn = time.process_time()
        pack(masks, pixels, images)
        seconds[turn] = drawn - begun, time.process_time() - drawn
    draw, packing = (1e3 * np.median(seconds[1:], axis=0)).tolist()  # the first turn warms up
    echo(f"{images} images, {grid[0]} x {grid[1]} patches: masks {draw:.1f} ms of CPU (goal < {GOAL_MS:.0f})")
    echo(f"packing them for the model: {packing:.1f} ms")
    return {
        **machine(),
        "images": images,
        "grid": list(grid),
        "repeats": repeats,
        "masks_ms": draw,
        "packing_ms": packing,
        "goal_ms": GOAL_MS,
    }
