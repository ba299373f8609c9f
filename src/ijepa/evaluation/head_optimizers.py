"""AdamW and SGD for many heads at once, with a rate and a decay for each; LARS stands in `lars`.

Layout as there: heads on the second axis from the end, the first parameter is the matrix and alone decays.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ijepa.evaluation.lars import Lars

EPS = 1e-8

Name = Literal["adamw", "sgd", "lars"]


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
        self._steps = 0

    def step(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        """Update the parameters by gradients of their shapes at rates (H, 1)."""
        self._steps += 1
        beta1, beta2 = self.betas
        self.parameters[0].mul_(1 - rate * self.decay)
        for values, gradient, (mean, square) in zip(self.parameters, gradients, self._moments, strict=True):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            length = (square / (1 - beta2**self._steps)).sqrt_().add_(EPS)
            values.sub_(mean / length * (rate / (1 - beta1**self._steps)))


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
            gathered.mul_(self.momentum).add_(gradient)
            if place == 0:
                gathered.add_(values * self.decay)
            values.sub_(gathered * rate)


def head_optimizer(
    name: Name, parameters: Sequence[Tensor], decay: Tensor, *, betas: tuple[float, float], momentum: float
) -> HeadOptimizer:
    """Return the optimiser of that name."""
    if name == "adamw":
        return AdamW(parameters, decay, betas=betas)
    if name == "sgd":
        return Sgd(parameters, decay, momentum=momentum)
    return Lars(parameters, decay, momentum=momentum)
