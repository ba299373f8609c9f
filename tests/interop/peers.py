"""Other people's libraries, as they are, and random weights to hand to them."""

import torch

from ijepa.model.encoder import Encoder
from ijepa.model.jepa import IJEPA
from ijepa.recipe import Recipe

SHAPES = {
    "tiny": {"image_size": 48, "patch_size": 8, "encoder": {"width": 32, "depth": 2, "heads": 4, "mlp_ratio": 3.0}},
    "small": {"image_size": 224, "patch_size": 16, "encoder": {"width": 384, "depth": 12, "heads": 6}},
    "odd": {"image_size": 96, "patch_size": 16, "encoder": {"width": 88, "depth": 1, "heads": 4, "mlp_ratio": 48 / 11}},
}
PREDICTOR = {"width": 48, "depth": 2, "heads": 4}


def recipe(name: str) -> Recipe:
    shape = SHAPES[name]
    predictor = {**PREDICTOR, "heads": shape["encoder"]["heads"]}
    return Recipe.read(
        {
            "name": name,
            "steps": 1,
            "schedule": {"warmup": "0 steps"},
            "mask": {"min_context": 1},
            "model": {**shape, "predictor": predictor},
        },
        "test",
    )


def random_model(name: str) -> IJEPA:
    """A model of which every parameter is random, biases and norms too, and the two encoders differ."""
    model = IJEPA(recipe(name).model, seed=3)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


def pixels(encoder: Encoder, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images as bytes, and normalised as other libraries want them."""
    height, width = (side * encoder.patch_size for side in encoder.grid)
    draw = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (count, 3, height, width), generator=draw, dtype=torch.uint8)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return raw, (raw / 255 - mean) / deviation
