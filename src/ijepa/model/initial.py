"""Initial weights, each drawn from the seed and its own name: the same on any device, rank, or sharding.

Linear weights are normal with standard deviation .02, biases zero, LayerNorms the identity, and the layers that
write into the residual stream (`attn.proj`, `mlp.fc2`) of layer l are divided by sqrt(2 l), l counted from 1
(as I-JEPA intends; Radford et al. 2019 for the idea). `xavier` takes sqrt(2 / (fan in + fan out)) for the deviation
instead (Glorot and Bengio 2010; MAE, arXiv 2111.06377, A.1, initialises so): in a narrow encoder .02 is so small that
a layer hardly changes its input, and the first targets are then little but position and a linear map of the pixels.
"""

import re
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ijepa.randomness import Stream, name_position, words

STD = 0.02
Scheme = Literal["normal", "xavier"]
_CHUNK = 1 << 22
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight$")


@torch.no_grad()
def initialize(module: nn.Module, seed: int, *, prefix: str = "", scheme: Scheme = "normal") -> None:
    """Fill every parameter of `module` in place; `prefix` + its name is the position of its draws."""
    for name, parameter in module.named_parameters():
        parameter.copy_(_initial(name, parameter, seed, name_position(prefix + name), scheme))


def _initial(name: str, like: Tensor, seed: int, position: int, scheme: Scheme) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(like.shape)
    if "norm" in name:
        return torch.ones(like.shape)
    std = STD
    if scheme == "xavier" and name.endswith("weight"):
        fan_out, fan_in = like.flatten(1).shape
        std = (2 / (fan_in + fan_out)) ** 0.5
    # The normal distribution's inverse: 32-bit words reach 6.2 standard deviations.
    draw = torch.erfinv(_centred(seed, position, like.numel())).mul_(2**0.5 * std)
    residual = _RESIDUAL.search(name)
    if residual:
        draw /= (2 * (int(residual[1]) + 1)) ** 0.5
    return draw.float().view(like.shape)


def _centred(seed: int, position: int, count: int) -> Tensor:
    """Uniform draws in (-1, 1), float64, at the centres of 2^32 equal cells."""
    out = torch.empty(count, dtype=torch.float64)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        word = words(seed, Stream.WEIGHTS, [position], size, skip=start)[0]
        out[start : start + size] = torch.from_numpy((word.astype(np.float64) + 0.5) * 2.0**-31 - 1)
    return out
