"""One optimiser step that no non-finite gradient can get through, and the target encoder's moving average.

AdamW with a learning rate for each part, fused where the device has it. Whether the gradient is finite is known only
on the device; the fused kernel takes that as `found_inf` and the EMA as a factor on its weight, so the step is void
without a synchronisation: neither weights, nor moments, nor the target encoder move.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ijepa.model.jepa import IJEPA
from ijepa.recipe import Optimizer
from ijepa.training.schedules import Rates


def make_optimizer(model: IJEPA, settings: Optimizer) -> torch.optim.AdamW:
    """Build AdamW over context encoder and predictor; biases, norms and the mask token take no weight decay."""
    groups = []
    for part, module in (("encoder", model.context_encoder), ("predictor", model.predictor)):
        named = list(module.named_parameters())
        for decays in (True, False):
            chosen = [parameter for name, parameter in named if decayed(name) == decays]
            groups.append({"params": chosen, "part": part, "decays": decays})
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def decayed(name: str) -> bool:
    """Whether a parameter of this name takes weight decay: weights of linear layers do, nothing else."""
    return name.endswith("weight") and "norm" not in name


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Set every group's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = rates.lr_encoder if group["part"] == "encoder" else rates.lr_predictor
        group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0


@torch.no_grad()
def apply_step(
    model: IJEPA, optimizer: torch.optim.Optimizer, momentum: float, clip_norm: float | None
) -> tuple[Tensor, Tensor]:
    """Take one step from the gradients in place, move the target encoder, and drop the gradients.

    Returns:
        The gradient's norm before clipping, and 1.0 where it was not finite (then the step was void), else 0.0;
        both () float32 on the device.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    void = (~norm.isfinite()).float()
    if clip_norm is not None:
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    optimizer.found_inf = void  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    move_average(model.target_encoder.parameters(), model.context_encoder.parameters(), (1 - momentum) * (1 - void))
    return norm, void


@torch.no_grad()
def move_average(average: Iterable[Tensor], current: Iterable[Tensor], weight: Tensor) -> None:
    """Move every average by `weight` () of the way to its current value, in place, in float32."""
    averages = list(average)
    torch._foreach_lerp_(averages, list(current), [weight] * len(averages))
