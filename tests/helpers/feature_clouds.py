"""Features in Gaussian clouds, and small labeled image sets with easy classes, for tests of classification."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Source
from ijepa.evaluation.classification.compare import Split

COLORS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


def clouds(n=1500, m=600, classes=5, width=24, blocks=1, spread=1.0, seed=0) -> Split:
    """Gaussian clouds, one per class; the distance between centers is about `sqrt(2 * width) * spread`."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(0, spread, (classes, blocks * width))
    y = np.arange(n + m) % classes
    x = torch.from_numpy(centers[y] + rng.normal(0, 1, (n + m, blocks * width))).half().unflatten(1, (blocks, width))
    y = torch.from_numpy(y)
    return Split(x[:n], y[:n], x[n:], y[n:], classes, None)


def write_colors(root: Path, each: int, *, names=tuple(COLORS), size=32, first=0) -> Path:
    """Class folders with noisy images in the color of the class."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + each):
            rng = np.random.default_rng([number, len(name)])
            noise = rng.normal(0, 60, (size, size, 3))
            pixels = (np.array(COLORS.get(name, (128, 128, 128))) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def color_sets(root: Path, **options) -> tuple[Source, Source]:
    train = write_colors(root / "train", 20, **options)
    test = write_colors(root / "val", 8, first=100, **options)
    return open_dataset(train), open_dataset(test)
