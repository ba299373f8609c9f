"""The batch: images and everything that is drawn for them, from the data loader to the model.

Sequences are *packed*: the tokens of all images are concatenated along one axis, and cumulative lengths (`cu_seqlens`
in FlashAttention) mark where each sequence starts. Nothing is cut to the shortest sequence. Nothing is padded either,
except to a token budget that keeps shapes constant. A patch has one flat number, `image * patches + patch`, so that
patches are gathered by one `index_select` over a (B * N, ...) view. The loader builds all of it in numpy, so a step on
the device makes no decisions.

Symbols: B images, N patches per image, Tc context tokens, Q target blocks of all images, Tt target tokens, Tp predictor
tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """S packed sequences of T tokens in all.

    Padding to a budget (`ijepa.masking.token_budget`) appends sequences that hold padding or nothing. `index` and
    `cu_seqlens` include them, `lengths` does not.
    """

    index: Tensor  # (T,) int64, the row that each token is read from
    cu_seqlens: Tensor  # (S + 1,) int32, where each sequence starts; from 0 to T
    lengths: tuple[int, ...]  # the S lengths as Python integers, so that no code has to read them back from a device
    limit: int = 0  # upper bound on every length, the same for every batch, so that shapes are constant; 0 for none
    real: Tensor | None = None  # (T,) bool, False for padding; None if there is none

    @property
    def longest(self) -> int:
        """Length of the longest sequence in tokens, or the upper bound on it."""
        return self.limit or max(self.lengths, default=0)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Sequences":
        """Return these sequences with `function` applied to every tensor."""
        real = None if self.real is None else function(self.real)
        return Sequences(function(self.index), function(self.cu_seqlens), self.lengths, self.limit, real)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the host or on a device.

    Attributes:
        pixels: (B, 3, H, W) uint8, as decoded; the model normalizes them. The loader's are channels last in memory.
        context: one sequence per image; `index` (Tc,) are flat patch numbers in [0, B * N).
        targets: one sequence per target block, image by image; `index` (Tt,) are flat patch numbers.
        predictor: one sequence per target block: the context tokens of its image, then the queries of the block;
            `index` (Tp,) are rows of [context tokens; target tokens], that is numbers in [0, Tc + Tt).
        queries: one sequence per target block; `index` (Tt,) are the rows of `predictor` that are queries.
        loss_weight: (Tt,) float32, the share of each target token in the loss. The tokens of a block have equal shares,
            the blocks of an image too, and the shares of an image add up to 1 / global batch.
        drop_path_rows: for each encoder layer, the rows of the context tokens whose images stochastic depth keeps, or
            None if it keeps all of them; empty without stochastic depth.
        positions: positions of the B samples in the endless sequence of samples.
        indices: indices of the B samples in the data set.
        replaced: names of samples that could not be decoded and were replaced.
    """

    pixels: Tensor
    context: Sequences
    targets: Sequences
    predictor: Sequences
    queries: Sequences
    loss_weight: Tensor
    drop_path_rows: tuple[Sequences | None, ...] = ()
    positions: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()
    replaced: tuple[str, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return this batch with `function` applied to every tensor."""
        return replace(self, **{f.name: _apply(getattr(self, f.name), function) for f in fields(self)})

    def pin_memory(self) -> "Batch":
        """Return this batch in page-locked memory, from which copies to a device overlap with computation."""
        return self.map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return this batch with every tensor on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def _apply(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Sequences):
        return value.map(function)
    if isinstance(value, tuple) and any(isinstance(item, Sequences) for item in value):
        return tuple(_apply(item, function) for item in value)
    return value
