"""A run that is small enough for a test, and the bytes that a resume must reproduce."""

from pathlib import Path

import numpy as np
import torch

from ijepa.checkpoint.format import list_checkpoints
from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
from ijepa.masking.batch import Batch
from ijepa.masking.packing import Packer
from tests.conftest import TINY

FILES = ("context_encoder", "target_encoder", "predictor", "optimizer")


def recipe(scenes: Path, **overrides) -> Recipe:
    values = {**TINY, "data": {**TINY["data"], "path": str(scenes)}}
    for key, value in overrides.items():
        section, _, field = key.partition("__")
        values[section] = {**values[section], field: value} if field else value
    return Recipe.read(values, "test")


def source(scenes: Path):
    return open_dataset(scenes, split="train")


def bytes_of(run: Path) -> dict[str, bytes]:
    last = list_checkpoints(run / "checkpoints")[-1]
    return {name: (last / f"{name}.safetensors").read_bytes() for name in FILES} | {
        "metrics": (run / "metrics.jsonl").read_bytes()
    }


class Kill(Exception):
    pass


def batch_of(chosen: Recipe) -> Batch:
    """Return the first batch of a run, with random pixels."""
    shape = chosen.model
    collate = Packer(chosen.mask, shape.grid, 0, 8, shape.encoder.depth, shape.encoder.drop_path)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, *shape.image_size), dtype=np.uint8))
    return collate(np.arange(8), pixels.contiguous(memory_format=torch.channels_last), (), ())
