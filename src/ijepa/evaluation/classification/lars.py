"""LARS for many heads at once: each head's rate is scaled by how long its matrix is against its update.

You et al., "Large batch training of convolutional networks" (arXiv 1708.03888), in the form that linear probes use: the
decay joins the gradient, the sum is scaled by trust * |w| / |g + decay w|, and momentum gathers what was scaled. The
rate comes after the momentum. Only matrices are scaled. Matrices decay, and biases where a protocol says so; a norm's
gain and offset never do. Where either length is 0 the scale is 1, so that a head that starts at zero can leave it.

Parameters have their heads on the second axis from the end: (F, H, C), (H, C), (F, H, 1). A rate or a decay (H, 1)
so fits them all, and a head's length is summed over all its axes but that one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TRUST = 0.001


class Lars:
    """LARS over heads side by side.

    Args:
        parameters: updated in place; the first is the matrix (F, H, C), and it alone is scaled.
        decay: (H, 1).
        decayed: how many parameters decay, counted from the first.
        momentum: share of the last update that is kept.
        trust: of the scale.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        decay: Tensor,
        *,
        momentum: float = 0.9,
        trust: float = TRUST,
        decayed: int = 1,
    ) -> None:
        self.parameters, self.decay, self.momentum, self.trust = parameters, decay, momentum, trust
        self.decayed = decayed
        self._gathered = [torch.zeros_like(parameter) for parameter in parameters]

    def step(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        """Update the parameters by gradients of their shapes at rates (H, 1)."""
        for place, (values, gradient, gathered) in enumerate(
            zip(self.parameters, gradients, self._gathered, strict=True)
        ):
            change = self._decayed(values, gradient) if place < self.decayed else gradient
            if place == 0:
                change = self._scaled(values, change)
            gathered.mul_(self.momentum).add_(change)
            values.flatten(-2).addcmul_(gathered.flatten(-2), spread(rate, values), value=-1)

    def _decayed(self, values: Tensor, gradient: Tensor) -> Tensor:
        decay = spread(self.decay, values)
        return torch.addcmul(gradient.flatten(-2), values.flatten(-2), decay).view_as(values)

    def _scaled(self, values: Tensor, change: Tensor) -> Tensor:
        length, step = (part.square().sum((0, 2), keepdim=True).sqrt() for part in (values, change))
        scale = torch.where((length > 0) & (step > 0), self.trust * length / step.clamp_min(1e-38), 1.0)
        return change.mul_(scale)


def spread(by_head: Tensor, values: Tensor) -> Tensor:
    """Return figures by head (H, 1) for each of a head's numbers (H * C), as `values` (..., H, C) have them flattened.

    Stretching them over a short last axis within every operation takes five times as long as the operation.
    """
    return by_head.expand(values.shape[-2:]).flatten()
