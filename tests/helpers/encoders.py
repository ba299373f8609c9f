"""Small encoders and image sets with masks, for tests of evaluation."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PALETTE = np.array([[20, 20, 20], [230, 40, 40], [40, 230, 40], [40, 40, 230]], dtype=np.uint8)
"""The color of each class in `write_pairs`, which makes its classes easy."""


class MeanColor:
    """The mean color of each patch, as features (B, N, 3)."""

    embed_dim = 3

    def __init__(self, patch_size: int = 8) -> None:
        self.patch_size = patch_size

    def __call__(self, pixels: Tensor) -> Tensor:
        pooled = torch.nn.functional.avg_pool2d(pixels.float(), self.patch_size)
        return pooled.flatten(2).transpose(1, 2)


class Noise:
    """Random features, drawn for each patch, the same in every run."""

    embed_dim, patch_size = 16, 8

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, pixels: Tensor) -> Tensor:
        n = (pixels.shape[2] // self.patch_size) * (pixels.shape[3] // self.patch_size)
        return torch.randn(len(pixels), n, self.embed_dim, generator=self.generator)


def block_mask(number: int, size: int = 32, block: int = 8, classes: int = 4) -> np.ndarray:
    """A mask of square blocks of random classes."""
    rng = np.random.default_rng(number)
    cells = rng.integers(0, classes, (size // block, size // block), dtype=np.uint8)
    return cells.repeat(block, 0).repeat(block, 1)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_pairs(root: Path, masks: list[np.ndarray], *, noise: float = 6.0) -> Path:
    """Write images/ and masks/: each class in its color of `PALETTE`, with some noise; label 255 is gray."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number, mask in enumerate(masks):
        rng = np.random.default_rng(1000 + number)
        colors = np.where(mask[..., None] < len(PALETTE), PALETTE[np.minimum(mask, len(PALETTE) - 1)], 128)
        image = (colors + rng.normal(0, noise, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)
        (root / "images" / f"{number:03d}.png").write_bytes(png(image))
        (root / "masks" / f"{number:03d}.png").write_bytes(png(mask))
    return root
