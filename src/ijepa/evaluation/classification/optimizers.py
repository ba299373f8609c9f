"""AdamW and SGD for many heads at once, with a rate and a decay for each; LARS stands in `lars`.

Layout as there: heads on the second axis from the end. The first parameter is the matrix, the second the bias. The
first `decayed` parameters decay: 1 is the matrix alone, 2 is matrix and bias.

An update goes over many heads' weights several times, operation by operation. It does so slab by slab, so that a slab
and its moments stay in the cache meanwhile, and what is computed on the way has one place: taking fresh memory for
every operation cost more than all of them.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ijepa.evaluation.classification.lars import Lars, spread

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
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101): decay beside the update, not within it.

    torch's fused kernel goes over gradient and moments once, but knows one rate for all heads: it updates zeros at a
    rate of 1, and what it leaves there joins the weights at each head's own.
    """

    def __init__(
        self, parameters: Sequence[Tensor], decay: Tensor, *, betas: tuple[float, float], decayed: int = 1
    ) -> None:
        self.parameters, self.decay, self.betas, self.decayed = parameters, decay, betas, decayed
        self._moments = [(torch.zeros_like(values), torch.zeros_like(values)) for values in parameters]
        self._between = parameters[0].new_empty(max(_slab(values) for values in parameters))
        self._steps = parameters[0].new_zeros(())

    def step(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        """Update the parameters by gradients of their shapes at rates (H, 1)."""
        self._steps += 1
        for place, (values, gradient, moments) in enumerate(
            zip(self.parameters, gradients, self._moments, strict=True)
        ):
            rates, kept = spread(rate, values), spread(1 - rate * self.decay, values)
            for part, slope, mean, square in slabs(values, gradient, *moments):
                change = self._between[: part.numel()].view_as(part).zero_()
                torch._fused_adamw_(
                    [change],
                    [slope],
                    [mean],
                    [square],
                    [],
                    [self._steps],
                    lr=1.0,
                    beta1=self.betas[0],
                    beta2=self.betas[1],
                    weight_decay=0.0,
                    eps=EPS,
                    amsgrad=False,
                    maximize=False,
                )
                flat = part.flatten(-2)
                if place < self.decayed:
                    flat.mul_(kept)
                flat.addcmul_(change.flatten(-2), rates)


class Sgd:
    """Stochastic gradient descent with momentum, the decay joining the gradient."""

    def __init__(self, parameters: Sequence[Tensor], decay: Tensor, *, momentum: float, decayed: int = 1) -> None:
        self.parameters, self.decay, self.momentum, self.decayed = parameters, decay, momentum, decayed
        self._gathered = [torch.zeros_like(values) for values in parameters]

    def step(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        """Update the parameters by gradients of their shapes at rates (H, 1)."""
        for place, (values, gradient, gathered) in enumerate(
            zip(self.parameters, gradients, self._gathered, strict=True)
        ):
            rates, decays = spread(rate, values), spread(self.decay, values)
            for parts in slabs(values, gradient, gathered):
                some, change, kept = (part.flatten(-2) for part in parts)
                kept.mul_(self.momentum).add_(change)
                if place < self.decayed:
                    kept.addcmul_(some, decays)
                some.addcmul_(kept, rates, value=-1)


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
    name: Name,
    parameters: Sequence[Tensor],
    decay: Tensor,
    *,
    betas: tuple[float, float],
    momentum: float,
    decayed: int = 1,
) -> HeadOptimizer:
    """Return the optimizer of that name."""
    if name == "adamw":
        return AdamW(parameters, decay, betas=betas, decayed=decayed)
    if name == "sgd":
        return Sgd(parameters, decay, momentum=momentum, decayed=decayed)
    return Lars(parameters, decay, momentum=momentum, decayed=decayed)
