"""Joining the processes that torchrun has started, for training or for evaluation.

torchrun starts the same command once for each device, and tells each process in the environment which one it is.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ijepa.config.recipe import Recipe
from ijepa.distributed.process_group import SINGLE_PROCESS, Strategy, World
from ijepa.utils.errors import UserError

_EVALUATION_TIMEOUT = timedelta(hours=2)


def under_torchrun() -> bool:
    """Whether torchrun, or a launcher like it, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_device() -> torch.device:
    """Return the GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def join_evaluation() -> Iterator[World]:
    """Join the other processes while the context lasts; without torchrun, return a world of one.

    A process group that exists already is used, and left as it is.
    """
    if dist.is_initialized():
        yield World(rank=dist.get_rank(), size=dist.get_world_size())
        return
    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) < 2:
        yield SINGLE_PROCESS
        return
    dist.init_process_group("gloo", timeout=_EVALUATION_TIMEOUT)
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size())
        dist.barrier()  # no rank leaves while another one still sends
    finally:
        dist.destroy_process_group()


@contextmanager
def join_training(recipe: Recipe, facts: dict[str, Any]) -> Iterator[World]:
    """Join the other processes while the context lasts; without torchrun, return a world of one.

    A process group that exists already is used, and left as it is. After an error the group is not destroyed, because
    that could wait for a rank that is lost.

    Args:
        recipe: decides the strategy and the time limit of collectives.
        facts: what must be the same on every rank.

    Raises:
        UserError: see `choose_strategy`; more processes than GPUs; or facts that differ.
    """
    joined = dist.is_initialized()
    yield _join(recipe, facts)
    if not joined and dist.is_initialized():
        dist.destroy_process_group()


def _join(recipe: Recipe, facts: dict[str, Any]) -> World:
    strategy = choose_strategy(recipe)
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    if strategy == "none":
        return World(launcher=launcher)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = (int(os.environ.get(key, "1")) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    shard = size
    if strategy == "hsdp":
        shard = local_size if recipe.parallel.shard == "auto" else recipe.parallel.shard
        if size % shard:
            raise UserError(f"parallel.shard = {shard}", f"does not divide {size} processes", "choose a divisor")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        _set_cuda_device(local_rank, local_size)
    timeout = timedelta(seconds=recipe.parallel.timeout)
    if not dist.is_initialized():
        if device == "cuda":
            # NCCL ends a process without an explanation, so it waits longer than gloo, which names the missing rank.
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=2 * timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    # Groups have their own connections, so the host's exchanges and the saving thread do not disturb each other.
    host, files = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    World(size=size, host=host).assert_same(facts)
    if strategy == "ddp":
        return World(strategy, rank, size, local_rank, host=host, files=files, launcher=launcher)
    from torch.distributed.device_mesh import init_device_mesh

    # hsdp: copies over nodes, shards inside a node, where the connection is faster.
    shape, names = ((size // shard, shard), ("copies", "shards")) if strategy == "hsdp" else ((size,), ("shards",))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    # Copies of sharded tensors in host memory need a mesh of CPU devices.
    cpu_mesh = mesh if device == "cpu" else init_device_mesh("cpu", shape, mesh_dim_names=names)
    return World(strategy, rank, size, local_rank, mesh, host, files, cpu_mesh, launcher)


def _set_cuda_device(local_rank: int, local_size: int) -> None:
    if local_size > (count := torch.cuda.device_count()):
        raise UserError(
            f"--nproc-per-node {local_size}",
            f"this process sees only {count} GPU{'s' * (count != 1)}",
            f"start {count} processes, and let each of them see all GPUs of the machine",
        )
    torch.cuda.set_device(local_rank)


def resolve_strategy(recipe: Recipe, size: int) -> Strategy:
    """Return `parallel.strategy`, and what `auto` stands for with `size` processes."""
    named = recipe.parallel.strategy
    return named if named != "auto" else "zero2" if size > 1 else "none"


def choose_strategy(recipe: Recipe) -> Strategy:
    """Resolve `parallel.strategy`, and check that it fits the number of processes.

    Raises:
        UserError: a strategy without torchrun, none with several processes, or a batch that does not divide.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if under_torchrun() else 1
    wanted = resolve_strategy(recipe, size)
    if wanted != "none" and not under_torchrun():
        raise UserError(
            f"parallel.strategy = {wanted}",
            "needs several processes, started by torchrun",
            "start with torchrun --nproc-per-node N -m ijepa ..., or add --parallel.strategy none",
        )
    if wanted == "none" and size > 1:
        raise UserError(
            "parallel.strategy = none",
            f"each of {size} processes would train the same model",
            "add --parallel.strategy zero2",
        )
    if recipe.batch.total % size:
        fits = max(d for d in range(1, size + 1) if recipe.batch.total % d == 0)
        raise UserError(
            f"batch.global = {recipe.batch.total}",
            f"is not divisible by {size} processes",
            f"start {fits} processes, for example",
        )
    micro = recipe.batch.micro
    if micro != "auto" and recipe.batch.total // size % micro:
        raise UserError(
            f"batch.micro = {micro}",
            f"does not divide the {recipe.batch.total // size} images of each of {size} processes",
            "choose a divisor, or auto",
        )
    return wanted
