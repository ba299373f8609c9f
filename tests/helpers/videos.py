"""Small labeled videos."""

from pathlib import Path

import numpy as np

from tests.helpers.encoders import PALETTE, png


def write_video(
    root: Path, name: str, *, frames: int = 6, labeled: int | None = None, labels: tuple[int, ...] = (0, 1, 2)
) -> None:
    """Write a video of 32 x 56 pixels: a square of class 1 moves right and one of class 2 down, 8 pixels per frame."""
    images, masks = root / "images" / name, root / "masks" / name
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in range(frames):
        mask = np.zeros((32, 56), np.uint8)
        mask[8:16, 8 * number : 8 * number + 8] = 1
        mask[8 * (number % 2) + 16 : 8 * (number % 2) + 24, 48:56] = 2
        noise = np.random.default_rng(number).normal(0, 4, (*mask.shape, 3))
        image = (PALETTE[mask] + noise).clip(0, 255).astype(np.uint8)
        (images / f"{number:05d}.png").write_bytes(png(image))
        if labeled is None or number < labeled:
            (masks / f"{number:05d}.png").write_bytes(png(np.array(labels, np.uint8)[mask]))
