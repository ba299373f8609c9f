"""The processes that train together: who this one is, and the few things that all of them must know alike.

torchrun starts the same command once for each device and says in the environment which is which. Tensors of the step
travel through the device's own backend; everything that the host decides (whether to stop, whether all agree on the
recipe) goes through gloo on the CPU, so that no decision waits for a device.

A run on one process is a world of one, in which nothing here communicates.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ijepa.config.recipe import Recipe
from ijepa.utils.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Item = TypeVar("Item")

# From torch 2.14 on it has a public name, and the private one warns.
_set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
_LAST_RESORT = timedelta(days=1)
"""How long a collective may take once a `Watchdog` decides when a rank has waited for too long."""
Strategy = Literal["none", "ddp", "zero2", "zero3", "hsdp"]


@dataclass(frozen=True)
class World:
    """One process among `size`; `mesh` is what weights are sharded over, None where they are not."""

    strategy: Strategy = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    mesh: "DeviceMesh | None" = None
    host: Any = field(default=None, compare=False)
    """The process group of the host's decisions, on gloo."""
    files: Any = field(default=None, compare=False)
    """Another one for what is written beside training; two users of one group would take each other's messages."""
    beside: "DeviceMesh | None" = field(default=None, compare=False)
    """`mesh` once more for tensors on the CPU."""
    launcher: int | None = field(default=None, compare=False)
    """Process id of the torchrun that started this process, if one did."""

    @property
    def copies(self) -> int:
        """How many times each shard of the weights is held: by all ranks with ddp, by one with zero2."""
        if self.mesh is None:
            return self.size
        return self.mesh.size(0) if self.mesh.ndim == 2 else 1

    def add(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, without waiting for the device; return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, value: Any) -> list[Any]:
        """Return every rank's small value, in the order of ranks; the host waits."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.host)
        return values

    def watched(self) -> None:
        """Let collectives take as long as they take; every rank calls it, once its `Watchdog` decides when to give up.

        A limit of a collective cannot tell a rank that is stuck from one that measures or compiles. Files keep theirs.
        """
        if self.size == 1:
            return
        meshes = self.mesh.get_all_groups() if self.mesh is not None else []
        for group in (dist.group.WORLD, self.host, *meshes):
            _set_timeout(_LAST_RESORT, group)
            if group is not self.host and torch.cuda.is_available():
                # NCCL connects at a group's first collective, for which the launcher's store has a limit of its own.
                dist.all_reduce(torch.zeros(1, device="cuda"), group=group)

    def stop_flag(self) -> "StopFlag":
        """Return what agrees on stopping."""
        return StopFlag(self)

    def assert_same(self, facts: dict[str, Any]) -> None:
        """Refuse, with the same line on every rank, where a fact of one rank is not that of rank 0.

        Raises:
            UserError: naming the first such fact, the rank and both values.
        """
        first, *others = self.gathered(facts)
        for rank, theirs in enumerate(others, 1):
            for key in sorted({*first, *theirs}):
                if first.get(key) != theirs.get(key):
                    raise UserError(
                        key,
                        f"is {theirs.get(key)} on rank {rank} and {first.get(key)} on rank 0",
                        "start every rank with the same recipe, flags and data",
                    )


class StopFlag:
    """Lets all ranks stop after the same step, without waiting: what a rank raises counts at every rank's next call."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._under_way: tuple[Any, Tensor] | None = None

    def agreed(self, mine: int) -> int:
        """Say what this rank wants (0 to go on) and return the largest that any rank has said in its last call.

        In a world of one it is the answer to this very call.
        """
        if self._world.size == 1:
            return mine
        answer = 0
        if self._under_way is not None:
            work, flag = self._under_way
            work.wait()
            answer = int(flag.item())
        flag = torch.tensor(mine)
        self._under_way = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._world.host, async_op=True), flag
        return answer


def under_torchrun() -> bool:
    """Whether a launcher has said which process of how many this is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_strategy(recipe: Recipe) -> Strategy:
    """Resolve `parallel.strategy`, and refuse what does not fit the number of processes.

    Raises:
        UserError: a strategy without torchrun, none with several processes, or a batch that does not divide.
    """
    wanted, size = recipe.parallel.strategy, int(os.environ.get("WORLD_SIZE", "1")) if under_torchrun() else 1
    if wanted == "auto":
        wanted = "zero2" if size > 1 else "none"
    if wanted != "none" and not under_torchrun():
        raise UserError(
            f"parallel.strategy = {wanted}",
            "needs processes to share the work",
            "start with torchrun --nproc-per-node N -m ijepa ..., or add --parallel.strategy none",
        )
    if wanted == "none" and size > 1:
        raise UserError(
            "parallel.strategy = none", f"{size} processes would train the same", "add --parallel.strategy zero2"
        )
    if recipe.batch.total % size:
        fits = max(d for d in range(1, size + 1) if recipe.batch.total % d == 0)
        raise UserError(
            f"batch.global = {recipe.batch.total}",
            f"is not divisible by {size} processes",
            f"start {fits}, for example",
        )
    micro = recipe.batch.micro
    if micro != "auto" and recipe.batch.total // size % micro:
        raise UserError(
            f"batch.micro = {micro}",
            f"does not divide the {recipe.batch.total // size} images of each of {size} processes",
            "choose a divisor, or auto",
        )
    return wanted


def join(recipe: Recipe, facts: dict[str, Any]) -> World:
    """Join the other processes that torchrun has started; alone, return a world of one.

    Raises:
        UserError: see `choose_strategy`; more processes than GPUs; or `facts`, what must be the same on every rank, are
            not.
    """
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
    patience = timedelta(seconds=recipe.parallel.timeout)
    if device == "cuda":
        if local_size > (there := torch.cuda.device_count()):
            raise UserError(
                f"--nproc-per-node {local_size}",
                f"this machine shows {there} GPU{'s' * (there > 1)}",
                f"start {there}, and let every process see all of them",
            )
        torch.cuda.set_device(local_rank)
    # NCCL ends a process without a word; it waits longer than what names the missing rank.
    backend, longer = ("cpu:gloo,cuda:nccl", 2 * patience) if device == "cuda" else ("gloo", patience)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=longer)
    host, files = (dist.new_group(backend="gloo", timeout=patience) for _ in range(2))
    World(size=size, host=host).assert_same(facts)
    if strategy == "ddp":
        return World(strategy, rank, size, local_rank, host=host, files=files, launcher=launcher)
    from torch.distributed.device_mesh import init_device_mesh

    shape, names = ((size // shard, shard), ("copies", "shards")) if strategy == "hsdp" else ((size,), ("shards",))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    beside = mesh if device == "cpu" else init_device_mesh("cpu", shape, mesh_dim_names=names)
    return World(strategy, rank, size, local_rank, mesh, host, files, beside, launcher)


def leave(world: World) -> None:
    """Leave the process group."""
    if world.strategy != "none" and dist.is_initialized():
        dist.destroy_process_group()


def summed(world: World, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums of several tensors over all ranks, by one reduction."""
    if world.size == 1:
        return list(parts)
    flat = world.add(torch.cat([part.reshape(-1) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def run_on_rank0(world: World, act: Callable[[], T]) -> T:
    """Let rank 0 act, and all others wait for it; what it returns, all return, and what it raises, all raise."""
    if world.size == 1:
        return act()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if world.rank == 0:
        try:
            outcome = act(), None
        except Exception as error:
            outcome = None, error
    result, caught = world.gathered(outcome)[0]
    if caught is not None:
        raise caught
    return result


def raise_on_any_rank(world: World, act: Callable[[], T]) -> T:
    """Let every rank act; what one of them raises, all raise, so that none waits for a rank that has given up."""
    if world.size == 1:
        return act()
    result, caught = None, None
    try:
        result = act()
    except Exception as error:
        caught = error
    for each in world.gathered(caught):
        if each is not None:
            raise each
    return result  # type: ignore[return-value]


_THREADS = 4


def share_out(world: World, items: Sequence[Item], act: Callable[[Item], T]) -> list[T]:
    """Distribute `items` over the ranks, let each rank act on its share in a few threads, and return all results.

    Every rank passes the same items and gets the results of all of them, in their order. If one rank raises, all do.
    """

    def mine() -> list[T]:
        share = items[world.rank :: world.size]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(act, share))

    results: list[Any] = [None] * len(items)
    for rank, part in enumerate(world.gathered(raise_on_any_rank(world, mine))):
        results[rank :: world.size] = part
    return results
