"""Initial weights, each drawn from the seed and its own name: the same on any device, rank, or sharding.

Linear weights are normal with standard deviation .02, biases zero, LayerNorms the identity, and the layers that
write into the residual stream (`attn.proj`, `mlp.fc2`) of layer l are divided by sqrt(2 l), l counted from 1
(as I-JEPA intends; Radford et al. 2019 for the idea). `xavier` takes sqrt(2 / (fan in + fan out)) for the deviation
instead (Glorot and Bengio 2010; MAE, arXiv 2111.06377, A.1, initialises so): in a narrow encoder .02 is so small that
a layer hardly changes its input, and the first targets are then little but position and a linear map of the pixels.
"""

import math
import re
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ijepa.utils.random import Stream, name_position, words

STD = 0.02
Scheme = Literal["normal", "xavier"]
_CHUNK = 1 << 22
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight$")


@torch.no_grad()
def initialize(module: nn.Module, seed: int, *, prefix: str = "", scheme: Scheme = "normal") -> None:
    """Fill every parameter of `module` in place; `prefix` + its name is the position of its draws.

    Parameters on the meta device are left alone: whoever gives them memory fills it by `initial_rows`.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            shape = tuple(parameter.shape)
            parameter.copy_(initial_rows(name, shape, (0, shape[0]), seed, prefix=prefix, scheme=scheme))


def initial_rows(
    name: str, shape: tuple[int, ...], rows: tuple[int, int], seed: int, *, prefix: str = "", scheme: Scheme = "normal"
) -> Tensor:
    """Draw rows [start, stop) of the parameter called `name` of shape (N, ...): (stop - start, ...) float32.

    Other rows are not drawn, so that a shard of a weight costs its share.
    """
    start, stop = rows
    part = (stop - start, *shape[1:])
    if name.endswith("bias"):
        return torch.zeros(part)
    if "norm" in name:
        return torch.ones(part)
    std, row = STD, math.prod(shape[1:])
    if scheme == "xavier" and name.endswith("weight"):
        std = (2 / (row + shape[0])) ** 0.5
    # The normal distribution's inverse: 32-bit words reach 6.2 standard deviations.
    draw = torch.erfinv(_centred(seed, name_position(prefix + name), start * row, stop * row)).mul_(2**0.5 * std)
    residual = _RESIDUAL.search(name)
    if residual:
        draw /= (2 * (int(residual[1]) + 1)) ** 0.5
    return draw.float().view(part)


def _centred(seed: int, position: int, begin: int, end: int) -> Tensor:
    """Draws [begin, end) of a position, uniform in (-1, 1), float64, at the centres of 2^32 equal cells."""
    out = torch.empty(end - begin, dtype=torch.float64)
    for start in range(0, end - begin, _CHUNK):
        size = min(_CHUNK, end - begin - start)
        before = (begin + start) % 4  # words come in blocks of four
        word = words(seed, Stream.WEIGHTS, [position], before + size, skip=begin + start - before)[0, before:]
        out[start : start + size] = torch.from_numpy((word.astype(np.float64) + 0.5) * 2.0**-31 - 1)
    return out
