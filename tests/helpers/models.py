"""A model whose parameters all matter: none is zero or one, as fresh biases and norms are."""

import torch

from ijepa.model.config import ModelConfig
from ijepa.model.ijepa import IJEPA


def randomized(shape: ModelConfig, dtype: torch.dtype = torch.float64) -> IJEPA:
    """A model with random biases, norms and target encoder."""
    model = IJEPA(shape, seed=1).to(dtype)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=dtype))
    return model
