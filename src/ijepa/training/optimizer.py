"""One optimiser step that no non-finite gradient can get through, and the target encoder's moving average.

AdamW with a learning rate for each part, fused where the device has it. Whether the gradient is finite is known only
on the device; the fused kernel takes that as `found_inf` and the EMA as a factor on its weight, so the step is void
without a synchronisation: neither weights, nor moments, nor the target encoder move.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ijepa.config.recipe import OptimizerSection
from ijepa.distributed.local_tensors import local
from ijepa.model.ijepa import IJEPA
from ijepa.model.parameter_groups import parameter_groups, trained
from ijepa.training.schedules import Rates

_CHUNK = 32 << 20
"""Bytes of differences that lie beside the averages at a time; an H100's cache holds 50 MB."""


def make_optimizer(model: IJEPA, settings: OptimizerSection, *, fused: bool = True) -> torch.optim.AdamW:
    """Build AdamW over context encoder and predictor; biases, norms and the mask token take no weight decay.

    Where weights are sharded, the optimiser holds this rank's parts as plain tensors. Only the fused one takes void
    steps for void.
    """
    with torch.no_grad():
        groups = [
            {"params": [local(parameter) for _, parameter in named], "part": part, "decays": decays}
            for part, decays, named in parameter_groups(model)
        ]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Set every group's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = rates.lr_encoder if group["part"] == "encoder" else rates.lr_predictor
        group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0


@torch.no_grad()
def gradient_norm(model: IJEPA, optimizer: torch.optim.Optimizer) -> Tensor:
    """Hand the gradients over to the optimiser and return the norm of this rank's part: () on the device."""
    for _, parameter, tensor in trained(model, optimizer):
        if tensor is not parameter and parameter.grad is not None:
            tensor.data = local(parameter.data)
            tensor.grad, parameter.grad = local(parameter.grad), None
    return nn.utils.get_total_norm(_gradients(optimizer))


@torch.no_grad()
def apply_step(
    model: IJEPA,
    optimizer: torch.optim.Optimizer,
    momentum: float,
    clip_norm: float | None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step from the gradients in place, move the target encoder, and drop the gradients.

    `norm` is the gradient's over all ranks, if `gradient_norm` was called before.

    Returns:
        The gradient's norm before clipping, and 1.0 where it was not finite (then the step was void), else 0.0;
        both () float32 on the device.
    """
    norm = gradient_norm(model, optimizer) if norm is None else norm
    gradients = _gradients(optimizer)
    void = (~norm.isfinite()).float()
    if clip_norm is not None:
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].dtype))
    if optimizer.defaults["fused"]:
        optimizer.found_inf = void  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    averages, current = model.target_encoder.parameters(), model.context_encoder.parameters()
    move_average(map(local, averages), map(local, current), (1 - momentum) * (1 - void))
    return norm, void


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@torch.no_grad()
def move_average(average: Iterable[Tensor], current: Iterable[Tensor], weight: Tensor) -> None:
    """Move every average by `weight` () of the way to its current value, in place, in the averages' precision."""
    pairs = list(zip(average, current, strict=True))
    if weight.is_cuda:
        move_by_differences(pairs, weight)
        return
    for mean, value in pairs:
        mean.lerp_(value, weight.to(mean.dtype))


@torch.no_grad()
def move_by_differences(pairs: Iterable[tuple[Tensor, Tensor]], weight: Tensor) -> None:
    """`move_average` by a few kernels for many tensors: average += weight * (current - average).

    A weight on the device sends torch's own `_foreach_lerp_` one tensor at a time: it has one kernel for many tensors
    if weights are as large as they are, and none if they are (). These three have. The differences of a few tensors at
    a time lie in a GPU's cache, so that main memory sees what one kernel would read and write.
    """
    for some in _in_chunks(pairs):
        averages = [average for average, _ in some]
        steps = torch._foreach_sub([current for _, current in some], averages)
        torch._foreach_mul_(steps, weight.to(steps[0].dtype))
        torch._foreach_add_(averages, steps)


def _in_chunks(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Cut into runs of no more than `_CHUNK` bytes, or of one pair that is larger."""
    some: list[tuple[Tensor, Tensor]] = []
    held = 0
    for pair in pairs:
        if some and held + pair[0].nbytes > _CHUNK:
            yield some
            some, held = [], 0
        some.append(pair)
        held += pair[0].nbytes
    if some:
        yield some
