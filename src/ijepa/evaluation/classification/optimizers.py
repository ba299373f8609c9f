"""Optimizers of the heads of a probe: one or two parameter groups per head, so that each has its own rate and decay."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

OptimizerName = Literal["adamw", "sgd", "lars"]

TRUST = 0.001
"""LARS: length of an update relative to that of the weights, at a learning rate of 1."""


class LARS(torch.optim.Optimizer):
    """SGD whose update of a matrix is scaled to the length of that matrix.

    You et al., "Large batch training of convolutional networks" (arXiv 1708.03888), in the form of MAE's and VISSL's
    linear probes: the gradient plus weight decay is scaled by trust * |w| / |gradient + decay * w|, then momentum is
    applied, then the learning rate. Vectors (biases, gains and offsets) are not scaled.

    Args:
        groups: parameter groups with `params`, `lr` and `weight_decay`.
        momentum: share of the last update that is kept.
        trust: factor on the scale.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float = 0.9, trust: float = TRUST) -> None:
        super().__init__(groups, {"momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters by their gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if parameter.ndim > 1:
                    length, step = parameter.norm(), update.norm()
                    # Weights that start at zero need a scale that is not zero to leave it.
                    scale = torch.where((length > 0) & (step > 0), group["trust"] * length / step, 1.0)
                    update.mul_(scale)
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(group["momentum"]).add_(update)
                parameter.sub_(momentum, alpha=group["lr"])


Setting = tuple[Tensor, float, float]
"""A parameter, its learning rate at the peak, and its weight decay."""


def parameter_groups(settings: Iterable[Setting]) -> list[dict[str, Any]]:
    """Return one parameter group for each pair of learning rate and weight decay; see `set_rates`."""
    groups: defaultdict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for parameter, lr, weight_decay in settings:
        groups[lr, weight_decay].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay, "lr": lr, "peak_lr": lr}
        for (lr, weight_decay), parameters in groups.items()
    ]


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def make_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], *, betas: tuple[float, float], momentum: float
) -> torch.optim.Optimizer:
    """Return the optimizer of that name; `betas` are for AdamW, `momentum` for SGD and LARS."""
    # fused: one pass over gradient, moments and weights of a group; the loops over groups take most of the time.
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, fused=True)
    return LARS(groups, momentum=momentum)
