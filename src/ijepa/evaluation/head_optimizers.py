"""AdamW and SGD for many heads at once, with a rate and a decay for each; LARS stands in `lars`.

Layout as there: heads on the second axis from the end, the first parameter is the matrix and alone decays.

An update goes over many heads' weights about ten times, operation by operation. It does so slab by slab, so that a slab
and its moments stay in the cache meanwhile, and what is computed on the way has one place: taking fresh memory for
every operation cost more than all of them.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ijepa.evaluation.lars import Lars

EPS = 1e-8

Name = Literal["adamw", "sgd", "lars"]


SLAB = 1 << 15
"""Numbers that are updated at once; with their gradient, two moments and what is between, half a megabyte."""


class HeadOptimizer(Protocol):
    """What updates heads."""

    def step(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        """Update the parameters by gradients of their shapes at rates (H, 1)."""
        ...


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101): decay beside the update, not within it."""

    def __init__(self, parameters: Sequence[Tensor], decay: Tensor, *, betas: tuple[float, float]) -> None:
        self.parameters, self.decay, self.betas = parameters, decay, betas
        self._moments = [(torch.zeros_like(values), torch.zeros_like(values)) for values in parameters]
        self._between = parameters[0].new_empty(max(_slab(values) for values in parameters))
        self._steps = 0

    def step(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        """Update the parameters by gradients of their shapes at rates (H, 1)."""
        self._steps += 1
        beta1, beta2 = self.betas
        kept, factor = 1 - rate * self.decay, rate / (1 - beta1**self._steps)
        for place, (values, gradient, moments) in enumerate(
            zip(self.parameters, gradients, self._moments, strict=True)
        ):
            for part, slope, mean, square in slabs(values, gradient, *moments):
                if place == 0:
                    part.mul_(kept)
                mean.lerp_(slope, 1 - beta1)
                square.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
                change = self._between[: part.numel()].view_as(part)
                torch.div(square, 1 - beta2**self._steps, out=change).sqrt_().add_(EPS)
                part.sub_(torch.div(mean, change, out=change).mul_(factor))


class Sgd:
    """Stochastic gradient descent with momentum, the decay joining the gradient."""

    def __init__(self, parameters: Sequence[Tensor], decay: Tensor, *, momentum: float) -> None:
        self.parameters, self.decay, self.momentum = parameters, decay, momentum
        self._gathered = [torch.zeros_like(values) for values in parameters]

    def step(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        """Update the parameters by gradients of their shapes at rates (H, 1)."""
        for place, (values, gradient, gathered) in enumerate(
            zip(self.parameters, gradients, self._gathered, strict=True)
        ):
            for some, change, kept in slabs(values, gradient, gathered):
                kept.mul_(self.momentum).add_(change)
                if place == 0:
                    kept.add_(some * self.decay)
                some.sub_(kept * rate)


def slabs(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors of one shape in parts of about `SLAB` numbers along the first axis.

    Those of two axes come whole, and so do those on a device, which would wait for each part's start.
    """
    if tensors[0].ndim < 3 or tensors[0].device.type != "cpu":
        return iter([tensors])
    rows = max(1, SLAB // tensors[0][0].numel())
    return zip(*(values.split(rows) for values in tensors), strict=True)


def _slab(values: Tensor) -> int:
    return next(slabs(values))[0].numel()


def head_optimizer(
    name: Name, parameters: Sequence[Tensor], decay: Tensor, *, betas: tuple[float, float], momentum: float
) -> HeadOptimizer:
    """Return the optimiser of that name."""
    if name == "adamw":
        return AdamW(parameters, decay, betas=betas)
    if name == "sgd":
        return Sgd(parameters, decay, momentum=momentum)
    return Lars(parameters, decay, momentum=momentum)
