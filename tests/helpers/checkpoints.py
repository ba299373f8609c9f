"""Checkpoints of a small model, and damage to them."""

import json
from pathlib import Path

import torch

from ijepa.checkpoint.state import describe, seal
from ijepa.config.recipe import EncoderSection, ModelSection, OptimizerSection, PredictorSection
from ijepa.model.ijepa import IJEPA
from ijepa.training.optimizer import apply_step, make_optimizer


def built(width: int = 16, seed: int = 0):
    shape = ModelSection(
        image_size=48,
        patch_size=8,
        encoder=EncoderSection(width=width, depth=1, heads=2),
        predictor=PredictorSection(width=16, depth=1, heads=2),
    )
    model = IJEPA(shape, seed)
    optimizer = make_optimizer(model, OptimizerSection())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    apply_step(model, optimizer, 0.9, None)
    model.position_mean.fill_(0.5)
    return model, optimizer


def reseal(path: Path, **changed: object) -> None:
    """Change a checkpoint's state, and make its sizes and checksums those of its files."""
    state = json.loads((path / "state.json").read_text()) | changed
    state["files"] = {name: describe(path / name) for name in state["files"]}
    del state["sha256"]
    (path / "state.json").write_text(seal(state))


def flip(file: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)
