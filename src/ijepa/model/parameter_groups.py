"""Groups of trained parameters: encoder and predictor with their own learning rates, with and without weight decay."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ijepa.model.ijepa import IJEPA


def parameter_groups(model: IJEPA) -> Iterator[tuple[str, bool, list[tuple[str, nn.Parameter]]]]:
    """Yield ("encoder" or "predictor", whether weight decay applies, named parameters), in a fixed order."""
    for part, module in (("encoder", model.context_encoder), ("predictor", model.predictor)):
        named = list(module.named_parameters())
        for decays in (True, False):
            yield part, decays, [(name, parameter) for name, parameter in named if decayed(name) == decays]


def decayed(name: str) -> bool:
    """Return whether weight decay applies to a parameter: to weights of linear layers and nothing else."""
    return name.endswith("weight") and "norm" not in name


def trained(model: IJEPA, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield (name, parameter of the model, tensor of the optimizer: the same one, or the part of it on this rank)."""
    for (part, _, named), group in zip(parameter_groups(model), optimizer.param_groups, strict=True):
        prefix = "context_encoder." if part == "encoder" else "predictor."
        for (name, parameter), tensor in zip(named, group["params"], strict=True):
            yield prefix + name, parameter, tensor
