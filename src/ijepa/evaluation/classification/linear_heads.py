"""Linear heads side by side over the same features: one matrix product serves them all, forward and backward.

Weights lie as (F, H, C) and a step is two products, (B, F) x (F, H C) and (F, B) x (B, H C). The gradient of the mean
cross-entropy is written out, softmax minus truth; there is no graph to build.

A batch norm before the heads normalises by figures of the features alone, so that all heads share it. Its gain and
offset, where it has them, are each head's own, and are folded into the weights: with W' = gain * W the product is the
same as without, and the gradients of gain and offset follow from that of W' without an array of (B, F, H).
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ijepa.evaluation.classification.optimizers import Name, head_optimizer
from ijepa.evaluation.metrics.accuracy import ranks_of
from ijepa.utils.random import Stream, name_position, random_bits

Norm = Literal["none", "batch", "batch-affine"]

FEW = 32
"""Classes up to which a softmax is taken operation by operation: torch's own takes six times as long over eight."""

KEEP = 0.9
"""Share of a batch norm's running figures that a step keeps."""


class Heads:
    """Linear heads over the same features (n, F), each with a learning rate and a weight decay of its own.

    Args:
        width: F.
        classes: C.
        grid: (learning rate, weight decay) of each of the H heads, the rate as it is at its peak.
        norm: what stands before them: nothing, a batch norm, or one with gain and offset.
        eps: of the batch norm.
        fixed: mean and deviation (F,) to bring features to first, instead of a batch norm.
        norm_batch: images that a batch norm takes its figures from; a step's images are cut into equal parts of at most
            so many, and each part is normalised by itself. All images of the step if None.
        optimizer, betas, momentum: see `head_optimizers`.
        decay_bias: biases decay, too.
        initial_std: deviation of the weights at the start, 0 for zero, biases 0; "linear" is the start of
            `torch.nn.Linear`, weights and biases uniform within 1 / sqrt(F). All heads start at the same draw.
        seed: of that draw.
        device: where they are trained.

    Attributes:
        weight: (F, H, C).
        bias: (H, C).
        gain, offset: (F, H, 1) where `norm` is "batch-affine".
        shift, scale: (F,), taken from and divided out of the features first; of a batch norm, its running figures.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        grid: Sequence[tuple[float, float]],
        *,
        norm: Norm = "none",
        eps: float = 1e-5,
        norm_batch: int | None = None,
        fixed: tuple[Tensor, Tensor] | None = None,
        optimizer: Name = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.9,
        decay_bias: bool = False,
        initial_std: float | Literal["linear"] = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.norm, self.eps, self.norm_batch, self.device = norm, eps, norm_batch, torch.device(device)
        weight, bias = torch.zeros(width, len(grid), classes), torch.zeros(len(grid), classes)
        if initial_std == "linear":
            drawn = symmetric((width + 1) * classes, seed).div_(math.sqrt(width)).float()
            weight += drawn[:-classes].view(width, 1, classes)
            bias += drawn[-classes:]
        elif initial_std:
            weight += normal(width * classes, seed).mul_(initial_std).view(width, 1, classes)
        self.weight, self.bias = weight.to(device), bias.to(device)
        self.shift, self.scale = (v.to(device) for v in fixed or (torch.zeros(width), torch.ones(width)))
        parameters = [self.weight, self.bias]
        if norm == "batch-affine":
            ones = torch.ones(width, len(grid), 1, device=device)
            self.gain, self.offset = ones, torch.zeros_like(ones)
            parameters += [self.gain, self.offset]
        self._variance = torch.ones(width, device=device)
        self._logits, self._matrix = torch.empty(0), torch.empty(0)  # the places of both products, taken once
        self.rate, decay = torch.tensor(grid, dtype=torch.float32, device=device).T[..., None]  # (H, 1) each
        self._optimizer = head_optimizer(
            optimizer, parameters, decay, betas=betas, momentum=momentum, decayed=2 if decay_bias else 1
        )

    def __len__(self) -> int:
        return len(self.bias)

    def step(self, x: Tensor, y: Tensor, factor: float) -> None:
        """Train every head by one batch: features (B, F) of any floating type, classes (B,), `factor` on the rates."""
        part, y = self._normalised(x.to(self.device, torch.float32)), y.to(self.device)
        weight, bias = self._folded()
        if self._logits.shape[0] != len(part):
            self._logits, self._matrix = part.new_empty(len(part), bias.numel()), torch.empty_like(weight)
        torch.addmm(bias.flatten(), part, weight.flatten(1), out=self._logits)
        scores = self._logits.unflatten(1, bias.shape)
        error = softmax_(scores)
        error[torch.arange(len(y), device=self.device), :, y] -= 1
        part, total = part / len(y), error.sum(0) / len(y)  # the mean's share: on few numbers, not on all errors
        torch.mm(part.T, error.flatten(1), out=self._matrix.flatten(1))
        matrix = self._matrix
        gradients = [matrix, total]
        if self.norm == "batch-affine":
            by_gain = (matrix * self.weight).sum(2, keepdim=True)
            by_offset = (self.weight * total).sum(2, keepdim=True)
            gradients = [matrix * self.gain + self.offset * total, total, by_gain, by_offset]
        self._optimizer.step(gradients, self.rate * factor)

    def logits(self, x: Tensor) -> Tensor:
        """Return (B, H, C) for features (B, F) of any floating type."""
        weight, bias = self._folded()
        return (self._prepared(x) @ weight.flatten(1)).unflatten(1, bias.shape) + bias

    def ranks(self, x: Tensor, y: Tensor, head: int) -> Tensor:
        """Return the true classes' ranks (B,) by one head."""
        weight, bias = (values[..., head, :] for values in self._folded())
        return ranks_of(self._prepared(x) @ weight + bias, y.to(self.device)).cpu()

    def plain(self, head: int) -> tuple[Tensor, Tensor]:
        """Return one head as a layer on features as they are: weight (C, F), bias (C,), all before it folded in."""
        weight, bias = (values[..., head, :] for values in self._folded())
        weight = weight / self.scale[:, None]
        return weight.T.contiguous().cpu(), (bias - self.shift @ weight).cpu()

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias as they apply to normalised features."""
        if self.norm != "batch-affine":
            return self.weight, self.bias
        return self.weight * self.gain, self.bias + (self.weight * self.offset).sum(0)

    def _prepared(self, x: Tensor) -> Tensor:
        return (x.to(self.device, torch.float32) - self.shift) / self.scale

    def _normalised(self, x: Tensor) -> Tensor:
        """Return a training batch (B, F), each part of it normalised by itself, and gather the first part's figures.

        Where devices normalise their own images, the running figures that count are those of the first one.
        """
        if self.norm == "none":
            return self._prepared(x)
        parts = x.tensor_split(-(-len(x) // (self.norm_batch or len(x))))
        figures = [(part.mean(0), part.var(0, correction=0)) for part in parts]
        (mean, variance), count = figures[0], len(parts[0])
        self.shift = KEEP * self.shift + (1 - KEEP) * mean
        self._variance = KEEP * self._variance + (1 - KEEP) * variance * (count / max(1, count - 1))
        self.scale = (self._variance + self.eps).sqrt()
        normalised = [
            (part - mean) / (variance + self.eps).sqrt() for part, (mean, variance) in zip(parts, figures, strict=True)
        ]
        return normalised[0] if len(normalised) == 1 else torch.cat(normalised)


def softmax_(scores: Tensor) -> Tensor:
    """Put the softmax over the last axis of scores (B, H, C) in their place, and return it."""
    if scores.shape[2] > FEW:
        return torch.softmax(scores, 2, out=scores)
    scores.sub_(scores.amax(2, keepdim=True)).exp_()
    return scores.div_(scores.sum(2, keepdim=True))


def normal(count: int, seed: int) -> Tensor:
    """Return draws (count,) of the standard normal distribution, the start of a head's weights."""
    return torch.erfinv(symmetric(count, seed)).mul_(math.sqrt(2)).float()


def symmetric(count: int, seed: int) -> Tensor:
    """Return draws (count,) float64, uniform in (-1, 1)."""
    word = random_bits(seed, Stream.WEIGHTS, [name_position("evaluation.head")], count)[0]
    return torch.from_numpy((word.astype(np.float64) + 0.5) * 2.0**-31 - 1)
