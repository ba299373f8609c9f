"""Small models, batches of sequences of equal lengths (so that nothing is padded), and simulated ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from ijepa.config.recipe import EncoderSection, ModelSection, PredictorSection
from ijepa.masking.batch import Batch
from ijepa.masking.masks import Masks
from ijepa.masking.packing import draw_drop_path, pack
from ijepa.planning.activations import Tokens

IMAGES, CONTEXT, BLOCKS, TARGET = 8, 32, 4, 32


def model(drop_path: float = 0.0) -> ModelSection:
    return ModelSection(
        image_size=96,
        patch_size=8,
        encoder=EncoderSection(width=192, depth=6, heads=3, drop_path=drop_path),
        predictor=PredictorSection(width=96, depth=4, heads=3),
    )


def batch(shape: ModelSection, drop_path: float = 0.0) -> tuple[Batch, Tokens]:
    """A batch whose contexts all have 32 patches, and whose target blocks too."""
    patches = shape.grid[0] * shape.grid[1]
    context = np.zeros((IMAGES, patches), dtype=bool)
    context[:, :CONTEXT] = True
    targets = np.zeros((IMAGES, BLOCKS, patches), dtype=bool)
    for block in range(BLOCKS):
        start = CONTEXT + 16 * block
        targets[:, block, start : start + TARGET] = True
    kept = draw_drop_path(0, np.arange(IMAGES), shape.encoder.depth, drop_path)
    pixels = torch.zeros(IMAGES, 3, *shape.image_size, dtype=torch.uint8)
    packed = pack(Masks(context, targets, shape.grid), pixels, IMAGES, kept)
    every = np.ones((IMAGES, shape.encoder.depth), dtype=bool)
    tokens = Tokens(patches, context.sum(1), targets.sum(2), every if kept is None else kept)
    return packed, tokens


@contextmanager
def simulated_rank(rank: int, ranks: int) -> Iterator[None]:
    """Make this process one rank of a group whose collectives do nothing; one rank alone needs no group."""
    if ranks == 1:
        yield
        return
    # torch has no public way to simulate ranks in one process.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
