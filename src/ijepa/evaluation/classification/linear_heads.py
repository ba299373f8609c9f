"""Linear heads on the same features, trained together; each has its own learning rate and weight decay.

The parameters of all H heads are stacked, so that one matrix product computes the logits of all heads. The optimizer
gets a view of each head's part, in its own parameter groups.

A batch norm before the heads has the same statistics for all of them. Its gain and offset are each head's own and are
folded into weight and bias, so that no array (B, H, F) of normalized features is needed.

Gradients and updates written by hand instead of autograd and torch.optim took 0.75 times the CPU time of the probes of
`evaluate linear --protocol demo` (1 thread, Xeon family 6 model 207), and 1.0 times that of probes on random crops.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ijepa.evaluation.classification.optimizers import OptimizerName, make_optimizer, parameter_groups, set_rates
from ijepa.evaluation.metrics.accuracy import class_ranks
from ijepa.utils.random import Stream, name_position, random_bits

Norm = Literal["none", "batch", "batch-affine"]

KEEP = 0.9
"""Share of the running statistics of a batch norm that a step keeps; torch calls 1 - KEEP its momentum."""

FEW_CLASSES = 32
"""On a CPU, torch's cross_entropy of up to about this many classes takes 3 times as long as a log-sum-exp."""


class LinearHeads:
    """H linear heads on features (n, F), with one learning rate and one weight decay each.

    Args:
        width: F.
        classes: C.
        grid: (peak learning rate, weight decay) of each head.
        norm: normalization before the heads: none, batch norm, or batch norm with gain and offset.
        eps: epsilon of the batch norm.
        norm_batch: largest number of images over which a batch norm computes its statistics. The images of a step are
            cut into equal parts, and each part is normalized by itself. All images of the step if None.
        fixed: mean and standard deviation (F,) that standardize the features in place of a batch norm.
        optimizer, betas, momentum: see `make_optimizer`.
        decay_bias: apply weight decay to biases as well.
        initial_std: standard deviation of the initial weights, with biases 0; "linear": weights and biases start as
            those of `torch.nn.Linear`, uniform within 1 / sqrt(F). All heads start at the same values.
        seed: seed of the initial values.
        device: device of the parameters.

    Attributes:
        weight, bias: (H, C, F) and (H, C).
        gain, offset: (H, F), if `norm` is "batch-affine".
        mean, std: (F,), applied to the features; running statistics if there is a batch norm.
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
        optimizer: OptimizerName = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.9,
        decay_bias: bool = False,
        initial_std: float | Literal["linear"] = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.norm, self.eps, self.norm_batch, self.device = norm, eps, norm_batch, torch.device(device)
        self.mean, self.std = (values.to(device) for values in fixed or (torch.zeros(width), torch.ones(width)))
        self._variance = torch.ones(width, device=device)
        weight, bias = initial_layer(width, classes, initial_std, seed)
        self._parameters = [weight, bias]
        if norm == "batch-affine":
            self._parameters += [torch.ones(width), torch.zeros(width)]
        self._parameters = [self._stack(values, len(grid)) for values in self._parameters]
        self.weight, self.bias, *affine = self._parameters
        if affine:
            self.gain, self.offset = affine
        decayed = [True, decay_bias, False, False]  # weight, bias, gain, offset
        settings = [
            (self._view(values, head), lr, weight_decay if has_decay else 0.0)
            for head, (lr, weight_decay) in enumerate(grid)
            for values, has_decay in zip(self._parameters, decayed, strict=False)
        ]
        self._optimizer = make_optimizer(optimizer, parameter_groups(settings), betas=betas, momentum=momentum)

    def __len__(self) -> int:
        return len(self.bias)

    @torch.enable_grad()
    def step(self, x: Tensor, y: Tensor, factor: float, progress: float = 0.0) -> None:
        """Train each head on one batch.

        Args:
            x: features (B, F) of any floating type.
            y: classes (B,).
            factor: factor on the peak learning rates.
            progress: not used here; the weight decay of attentive heads depends on it.
        """
        logits = self._logits(self._normalize_batch(x.to(self.device, torch.float32)))
        for values in self._parameters:
            assert values.grad is not None
            values.grad.zero_()  # in place, because the optimizer has views of it
        # The sum of the heads' mean losses: its gradient by the parameters of a head is that of the head's own loss.
        (summed_cross_entropy(logits, y.to(self.device)) / len(y)).backward()
        set_rates(self._optimizer, factor)
        self._optimizer.step()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return (B, H, C) for features (B, F) of any floating type."""
        return self._logits(self._normalize(x))

    @torch.no_grad()
    def class_ranks(self, x: Tensor, y: Tensor, head: int) -> Tensor:
        """Return the ranks (B,) of the true classes `y` by one head."""
        weight, bias = (values[head] for values in self._folded())
        return class_ranks(linear(self._normalize(x), weight, bias), y.to(self.device)).cpu()

    @torch.no_grad()
    def layer(self, head: int) -> tuple[Tensor, Tensor]:
        """Return weight (C, F) and bias (C,) of one head as a layer on features that are not normalized."""
        weight, bias = (values[head] for values in self._folded())
        weight = weight / self.std
        return weight.cpu(), (bias - weight @ self.mean).cpu()

    def _stack(self, values: Tensor, heads: int) -> Tensor:
        """Return a parameter (H, ...) that holds the same values for each head, with a gradient of zeros."""
        stacked = values.to(self.device).expand(heads, *values.shape).clone().requires_grad_()
        stacked.grad = torch.zeros_like(stacked)
        return stacked

    @staticmethod
    def _view(values: Tensor, head: int) -> nn.Parameter:
        """Return the part of one head; its memory and that of its gradient belong to the stacked parameter."""
        assert values.grad is not None
        view = nn.Parameter(values.detach()[head])
        view.grad = values.grad[head]
        return view

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Return weight (H, C, F) and bias (H, C) on normalized features, with gain and offset folded in."""
        if self.norm != "batch-affine":
            return self.weight, self.bias
        return self.weight * self.gain[:, None], self.bias + (self.weight * self.offset[:, None]).sum(2)

    def _logits(self, x: Tensor) -> Tensor:
        weight, bias = self._folded()
        return linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)  # (B, H * C) -> (B, H, C)

    def _normalize(self, x: Tensor) -> Tensor:
        return (x.to(self.device, torch.float32) - self.mean) / self.std

    def _normalize_batch(self, x: Tensor) -> Tensor:
        """Return a training batch (B, F), each part normalized by itself, and update the running statistics."""
        if self.norm == "none":
            return self._normalize(x)
        parts = x.tensor_split(-(-len(x) // (self.norm_batch or len(x))))
        # As with one batch norm per device and no synchronization, running statistics are those of the first device.
        variance = parts[0].var(0, correction=min(1, len(parts[0]) - 1))
        self.mean = KEEP * self.mean + (1 - KEEP) * parts[0].mean(0)
        self._variance = KEEP * self._variance + (1 - KEEP) * variance
        self.std = (self._variance + self.eps).sqrt()
        return torch.cat([(part - part.mean(0)) / (part.var(0, correction=0) + self.eps).sqrt() for part in parts])


def summed_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the sum over images and heads of the cross-entropy of logits (B, H, C) with classes (B,)."""
    heads = logits.shape[1]
    if logits.shape[2] > FEW_CLASSES:
        return cross_entropy(logits.flatten(0, 1), y.repeat_interleave(heads), reduction="sum")
    return logits.logsumexp(2).sum() - logits.gather(2, y[:, None, None].expand(-1, heads, 1)).sum()


def initial_layer(width: int, classes: int, std: float | Literal["linear"], seed: int) -> tuple[Tensor, Tensor]:
    """Return the initial weight (C, F) and bias (C,) of a head; see `LinearHeads` for `std`."""
    weight, bias = torch.zeros(width, classes), torch.zeros(classes)
    if std == "linear":
        drawn = symmetric((width + 1) * classes, seed).div_(math.sqrt(width)).float()
        weight, bias = drawn[:-classes].view(width, classes), drawn[-classes:]
    elif std:
        weight = normal(width * classes, seed).mul_(std).view(width, classes)
    return weight.T, bias


def normal(count: int, seed: int) -> Tensor:
    """Return draws (count,) float32 of the standard normal distribution."""
    return torch.erfinv(symmetric(count, seed)).mul_(math.sqrt(2)).float()


def symmetric(count: int, seed: int) -> Tensor:
    """Return draws (count,) float64, uniform in (-1, 1)."""
    word = random_bits(seed, Stream.WEIGHTS, [name_position("evaluation.head")], count)[0]
    return torch.from_numpy((word.astype(np.float64) + 0.5) * 2.0**-31 - 1)
