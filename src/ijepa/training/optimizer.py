"""The optimizer step, which a non-finite gradient makes void, and the target encoder's moving average.

AdamW with one learning rate per part. Only the device knows whether the gradient is finite. The fused kernel reads that
as `found_inf`, and the moving average as a factor of its weight. So a void step changes neither weights, nor moments,
nor the target encoder, and needs no synchronization.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ijepa.config.recipe import OptimizerSection
from ijepa.distributed.local_tensors import to_local
from ijepa.model.ijepa import IJEPA
from ijepa.model.parameter_groups import parameter_groups, trained
from ijepa.training.schedules import Rates

_CHUNK_BYTES = 32 << 20
"""Bytes of differences at a time, which a GPU's cache holds: an H100's has 50 MB."""


def make_optimizer(model: IJEPA, settings: OptimizerSection, *, fused: bool = True) -> torch.optim.AdamW:
    """Build AdamW over context encoder and predictor; biases, norms and the mask token take no weight decay.

    If weights are sharded, the optimizer holds this rank's parts as plain tensors. Only the fused kernel skips void
    steps.
    """
    with torch.no_grad():
        # lr=0 below: `set_rates` sets the rates of every step.
        groups = [
            {"params": [to_local(parameter) for _, parameter in named], "part": part, "decays": decays}
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
    """Give the gradients to the optimizer and return the norm of this rank's part, () on the device."""
    for _, parameter, tensor in trained(model, optimizer):
        # Sharded weights: the optimizer's plain tensor shares memory with this rank's part of the parameter.
        if tensor is not parameter and parameter.grad is not None:
            tensor.data = to_local(parameter.data)
            tensor.grad, parameter.grad = to_local(parameter.grad), None
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

    `norm` is the norm over all ranks; None if `gradient_norm` has not been called.

    Returns:
        The gradient's norm before clipping, and 1.0 if it was not finite, which makes the step void, else 0.0;
        both () float32 on the device.
    """
    norm = gradient_norm(model, optimizer) if norm is None else norm
    gradients = _gradients(optimizer)
    void = (~norm.isfinite()).float()
    if clip_norm is not None:
        # A factor on the device and not an `if` on the host, which would have to wait for the norm.
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].dtype))
    if optimizer.defaults["fused"]:
        optimizer.found_inf = void  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    averages, current = model.target_encoder.parameters(), model.context_encoder.parameters()
    move_average(map(to_local, averages), map(to_local, current), (1 - momentum) * (1 - void))
    return norm, void


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@torch.no_grad()
def move_average(average: Iterable[Tensor], current: Iterable[Tensor], weight: Tensor) -> None:
    """Move every average by `weight` () of the way to its current value, in place, in the averages' precision."""
    pairs = list(zip(average, current, strict=True))
    if weight.is_cuda:  # on a CPU, many small kernels cost little
        move_by_differences(pairs, weight)
        return
    for mean, value in pairs:
        mean.lerp_(value, weight.to(mean.dtype))


@torch.no_grad()
def move_by_differences(
    pairs: Iterable[tuple[Tensor, Tensor]], weight: Tensor, chunk_bytes: int = _CHUNK_BYTES
) -> None:
    """Do what `move_average` does with a few kernels for many tensors: average += weight * (current - average).

    `torch._foreach_lerp_` falls back to one kernel per tensor if the weight is a () tensor on the device. Sub, mul and
    add have one kernel for many tensors. The differences of a chunk stay in the GPU's cache, so that main memory is
    read and written only as by one kernel.
    """
    for some in _in_chunks(pairs, chunk_bytes):
        averages = [average for average, _ in some]
        steps = torch._foreach_sub([current for _, current in some], averages)
        torch._foreach_mul_(steps, weight.to(steps[0].dtype))
        torch._foreach_add_(averages, steps)


def _in_chunks(pairs: Iterable[tuple[Tensor, Tensor]], most: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Split into groups of at most `most` bytes, or of one larger pair."""
    some: list[tuple[Tensor, Tensor]] = []
    held = 0
    for pair in pairs:
        if some and held + pair[0].nbytes > most:
            yield some
            some, held = [], 0
        some.append(pair)
        held += pair[0].nbytes
    if some:
        yield some
