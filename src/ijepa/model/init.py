"""Initial weights, each drawn from the seed and its own name: the same on every device and rank, with any sharding.

Linear weights are normal with standard deviation 0.02, biases are zero, and LayerNorms are the identity. The weights of
the layers that write into the residual stream (`attn.proj`, `mlp.fc2`) of layer l are divided by sqrt(2 l), l counted
from 1, as in I-JEPA's code (the idea is of Radford et al. 2019).

The scheme `xavier` uses the standard deviation sqrt(2 / (fan in + fan out)) instead (Glorot and Bengio 2010), as MAE
does (arXiv 2111.06377, A.1). In a narrow encoder 0.02 is so small that a layer hardly changes its input, and the first
targets are little more than the position and a linear map of the pixels.
"""

import math
import re

import numpy as np
import torch
from torch import Tensor, nn

from ijepa.model.config import InitScheme
from ijepa.utils.random import Stream, name_position, random_bits

STD = 0.02
_CHUNK = 1 << 22  # draws at a time, to limit memory
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight$")


@torch.no_grad()
def init_weights(module: nn.Module, seed: int, *, prefix: str = "", scheme: InitScheme = "normal") -> None:
    """Fill every parameter of `module` in place; the position of its draws is the hash of `prefix` + its name.

    Parameters on the meta device stay as they are; the code that allocates them fills them by `initial_rows`.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            shape = tuple(parameter.shape)
            parameter.copy_(initial_rows(name, shape, (0, shape[0]), seed, prefix=prefix, scheme=scheme))


def initial_rows(
    name: str,
    shape: tuple[int, ...],
    rows: tuple[int, int],
    seed: int,
    *,
    prefix: str = "",
    scheme: InitScheme = "normal",
) -> Tensor:
    """Draw rows [start, stop) of the parameter `name` of shape (N, ...): (stop - start, ...) float32.

    Only these rows are drawn, so the cost of a shard of a weight is proportional to its size.
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
    # The inverse of the normal distribution function: 32-bit words reach 6.2 standard deviations.
    draw = torch.erfinv(_centered(seed, name_position(prefix + name), start * row, stop * row)).mul_(2**0.5 * std)
    residual = _RESIDUAL.search(name)
    if residual:
        draw /= (2 * (int(residual[1]) + 1)) ** 0.5
    return draw.float().view(part)  # (rows * row,) -> (rows, ...)


def _centered(seed: int, position: int, begin: int, end: int) -> Tensor:
    """Return draws [begin, end) of a position, uniform in (-1, 1), float64, at the centers of 2^32 equal cells."""
    out = torch.empty(end - begin, dtype=torch.float64)
    for start in range(0, end - begin, _CHUNK):
        size = min(_CHUNK, end - begin - start)
        before = (begin + start) % 4  # words come in blocks of four
        word = random_bits(seed, Stream.WEIGHTS, [position], before + size, skip=begin + start - before)[0, before:]
        out[start : start + size] = torch.from_numpy((word.astype(np.float64) + 0.5) * 2.0**-31 - 1)
    return out
