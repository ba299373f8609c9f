"""The one thing that travels from the data to the model: a batch of images and everything drawn for it.

Sequences are *packed*: the tokens of all images stand behind one another in one axis, with cumulative lengths
(`cu_seqlens`, as FlashAttention calls them) saying where each sequence starts. Nothing is cut to the batch's shortest,
and nothing is padded, unless to a budget that keeps shapes constant. A patch is named by one flat number,
`image * patches + patch`, so that gathering is one `index_select` over a (B * N, ...) view. All of it is built by the
loader, in numpy, so that a step on the device has no decision left to take.

Symbols: B images, N patches an image, Tc context tokens, Q target blocks in all, Tt target tokens, Tp predictor
tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Packed sequences: which row each token is read from, and where each sequence starts.

    `index` (T,) int64 are flat rows; `cu_seqlens` (S + 1,) int32 starts with 0 and ends with T; `lengths` are
    the S lengths as plain integers, so that no code has to read them back from a device.

    Padded to a budget (`ijepa.masking.token_budget`), the S sequences are followed by others that hold padding or
    nothing: `cu_seqlens` and `index` then count these too and `lengths` does not. `real` (T,) is True for the tokens of
    the S sequences, and `limit` bounds every length, whatever the batch: with it shapes are the same at every step.
    """

    index: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    limit: int = 0
    real: Tensor | None = None

    @property
    def longest(self) -> int:
        """Length of the longest sequence, in tokens, or the bound on it."""
        return self.limit or max(self.lengths, default=0)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Sequences":
        """Return these sequences with `function` applied to every tensor of them."""
        real = None if self.real is None else function(self.real)
        return Sequences(function(self.index), function(self.cu_seqlens), self.lengths, self.limit, real)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the host or on a device.

    Attributes:
        pixels: (B, 3, H, W) uint8, as decoded; normalised on the device. The loader's are channels last in memory.
        context: one sequence an image; `index` (Tc,) are flat patch numbers in [0, B * N).
        targets: one sequence a target block; `index` (Tt,) are flat patch numbers. Blocks stand image by image.
        predictor: one sequence a target block: its image's context tokens, then the block's queries; `index`
            (Tp,) are rows of [context tokens; target tokens], that is numbers in [0, Tc + Tt).
        queries: one sequence a target block: the (Tt,) rows of the predictor's packed tokens that are queries.
        loss_weight: (Tt,) float32; each target token's share of the loss: the shares of one block are equal,
            the blocks of one image share alike, and each image has 1 / global batch in all.
        kept: for each encoder layer, the rows of the context tokens whose images stochastic depth keeps, with
            their sequences, or None where it keeps all; empty where there is no stochastic depth.
        positions: the B samples' places in the endless sequence of samples.
        indices: the B samples' indices in the data set.
        replaced: names of samples that could not be decoded and were replaced.
    """

    pixels: Tensor
    context: Sequences
    targets: Sequences
    predictor: Sequences
    queries: Sequences
    loss_weight: Tensor
    kept: tuple[Sequences | None, ...] = ()
    positions: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()
    replaced: tuple[str, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return this batch with `function` applied to every tensor of it."""
        return replace(self, **{f.name: _apply(getattr(self, f.name), function) for f in fields(self)})

    def pin_memory(self) -> "Batch":
        """Return this batch in page-locked memory, for copies to a device beside its work."""
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
