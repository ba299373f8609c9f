"""A run that is small enough for a test, and the bytes that a resume must reproduce."""

from pathlib import Path

from ijepa.checkpoint.format import list_checkpoints
from ijepa.config.recipe import Recipe
from ijepa.data.open import open_dataset
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
