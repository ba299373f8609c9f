"""The processes that train or evaluate together: which one this is, and what they exchange.

Tensors of a training step go through the backend of the device. Everything that the host decides (whether to stop,
whether all ranks have the same recipe) goes through gloo on the CPU, so that no decision waits for a device.

In evaluation each rank computes the features of its own batches, and every rank holds all of them in the end. Batches
are distributed whole, so that every forward pass sees the images that one process would give it: the result is the
same for any number of processes. For ImageNet-1K and four blocks of ViT-H in float16, all features have 13 GB.

On one process nothing here communicates.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ijepa.utils.errors import RunError, UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Item = TypeVar("Item")
Strategy = Literal["none", "ddp", "zero2", "zero3", "hsdp"]
Tensors = tuple[Tensor, ...]

# torch 2.14 made it public, and warns about the private name.
_set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
_NO_TIMEOUT = timedelta(days=1)
_THREADS = 4
_CHUNK_BYTES = 64 * 2**20
"""Bytes of one reduction of features."""


@dataclass(frozen=True)
class World:
    """One process among `size`. Weights are sharded over `mesh`; None where they are not."""

    strategy: Strategy = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    mesh: "DeviceMesh | None" = None
    host: Any = field(default=None, compare=False)
    """The gloo process group of the host's decisions; None is torch's default group."""
    files: Any = field(default=None, compare=False)
    """A second gloo group for the thread that saves: two threads must not share a group."""
    cpu_mesh: "DeviceMesh | None" = field(default=None, compare=False)
    """`mesh` for tensors on the CPU."""
    launcher: int | None = field(default=None, compare=False)
    """Process id of the torchrun that started this process, if one did."""

    @property
    def copies(self) -> int:
        """How many ranks hold each shard of the weights: all with ddp, one with zero2."""
        if self.mesh is None:
            return self.size
        return self.mesh.size(0) if self.mesh.ndim == 2 else 1

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's small value, in the order of ranks; the host waits."""
        values: list[Any] = [value] * self.size
        # The objects are pickled. They come from this program's own ranks, so pickle is safe here.
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.host)
        return values

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of several tensors over all ranks, by one reduction; the host does not wait."""
        if self.size == 1:
            return list(tensors)
        # One collective for all tensors, because the latency of each counts more than its bytes.
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def run_on_rank0(self, act: Callable[[], T]) -> T:
        """Call `act` on rank 0, while all others wait. Every rank returns its result, or raises its error."""
        if self.size == 1:
            return act()
        # An error is sent like a result, so that the other ranks do not wait for one that never comes.
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = act(), None
            except Exception as error:
                outcome = None, error
        result, caught = self.all_gather_object(outcome)[0]
        if caught is not None:
            raise caught
        return result  # type: ignore[return-value]

    def raise_on_any_rank(self, act: Callable[[], T]) -> T:
        """Call `act` on every rank. If it raises on one, all ranks raise, so that none waits for a rank that ended."""
        if self.size == 1:
            return act()
        result, caught = None, None
        try:
            result = act()
        except Exception as error:
            caught = error
        for each in self.all_gather_object(caught):
            if each is not None:
                raise each
        return result  # type: ignore[return-value]

    def map_items(self, items: Sequence[Item], act: Callable[[Item], T]) -> list[T]:
        """Distribute `items` over the ranks, and over a few threads on each; return all results in order on every rank.

        Every rank passes the same items. If one rank raises, all do.
        """

        def own() -> list[T]:
            with ThreadPoolExecutor(_THREADS) as pool:
                return list(pool.map(act, items[self.rank :: self.size]))

        results: list[Any] = [None] * len(items)
        for rank, part in enumerate(self.all_gather_object(self.raise_on_any_rank(own))):
            results[rank :: self.size] = part
        return results

    def assert_same(self, facts: dict[str, Any]) -> None:
        """Refuse facts that differ between ranks, with the same line on every rank.

        Raises:
            UserError: the first fact that differs from rank 0's, with the rank and both values.
        """
        first, *others = self.all_gather_object(facts)
        for rank, theirs in enumerate(others, 1):
            for key in sorted({*first, *theirs}):
                if first.get(key) != theirs.get(key):
                    raise UserError(
                        key,
                        f"is {theirs.get(key)} on rank {rank} and {first.get(key)} on rank 0",
                        "start every rank with the same recipe, flags and data",
                    )

    def lift_timeouts(self) -> None:
        """Remove the time limit of collectives; every rank calls it once its `Watchdog` runs.

        The limit of a collective cannot tell a rank that is stuck from one that measures or compiles; the watchdog
        can. Saving keeps its limit.
        """
        if self.size == 1:
            return
        meshes = self.mesh.get_all_groups() if self.mesh is not None else []
        for group in (dist.group.WORLD, self.host, *meshes):
            _set_timeout(_NO_TIMEOUT, group)
            if group is not self.host and torch.cuda.is_available():
                # NCCL connects at a group's first collective, and the launcher's store has its own limit for that.
                dist.all_reduce(torch.zeros(1, device="cuda"), group=group)

    def batch_rows(self, count: int, batch: int) -> npt.NDArray[np.int64]:
        """Return which of `count` rows this rank computes: every `size`-th batch of `batch` rows."""
        rows = np.arange(count)
        return rows[rows // batch % self.size == self.rank]

    def fill_rows(self, x: Tensor) -> Tensor:
        """Fill in, in place, the rows of `x` that other ranks have computed and that are zero here; return `x`."""
        if self.size > 1 and x.numel():
            # Bytes, because their sum is exact for every dtype and value. Chunks bound the memory of gloo's copies.
            for chunk in x.view(-1).view(torch.uint8).split(_CHUNK_BYTES):
                dist.all_reduce(chunk, group=self.host)
        return x

    def gather_rows(self, parts: list[Tensor], rows: npt.NDArray[np.int64], count: int) -> Tensor:
        """Return all `count` rows on every rank. This rank has computed those numbered `rows`, in `parts`."""
        if self.size == 1:
            return torch.cat(parts)
        # A rank without rows learns their shape and dtype from the others.
        kinds = self.all_gather_object((parts[0].shape[1:], parts[0].dtype) if parts else None)
        shape, dtype = next(kind for kind in kinds if kind is not None)
        x = torch.zeros(count, *shape, dtype=dtype)
        if parts:
            x[torch.from_numpy(rows)] = torch.cat(parts)
        return self.fill_rows(x)

    def map_in_turns(self, count: int, make: Callable[[Iterable[int]], Iterator[Tensors]]) -> Iterator[Tensors]:
        """Yield what `make` yields for the numbers 0 to `count`, in order: rank r computes r, r + size, ...

        Each rank holds one turn at a time, so this suits what does not fit into memory as a whole.

        Args:
            count: number of batches.
            make: from numbers to one tuple of tensors for each.

        Raises:
            RunError: what `make` raised on any rank, on every rank.
        """
        if self.size == 1:
            yield from make(range(count))
            return
        own = make(range(self.rank, count, self.size))
        # In the last turn there may be fewer batches than ranks.
        for first in range(0, count, self.size):
            made = self.all_gather_object(_next(own) if first + self.rank < count else ())
            for each in made:
                if isinstance(each, RunError):
                    raise each
            yield from made[: count - first]  # type: ignore[misc]


SINGLE_PROCESS = World()


def _next(own: Iterator[Tensors]) -> Tensors | RunError:
    try:
        # A view would be sent with all of the storage it points into, so send copies.
        return tuple(values.cpu().clone() for values in next(own))
    except RunError as error:
        return error


class StopFlag:
    """Lets all ranks stop after the same step, without waiting: a request counts at every rank's next call."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def exchange(self, request: int) -> int:
        """Send this rank's request (0 is none), and return the largest of all ranks' requests at their last call.

        On one process, return `request`.
        """
        if self._world.size == 1:
            return request
        # The reduction of the last call has had a whole step to finish, so this wait is short.
        answer = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            answer = int(flag.item())
        flag = torch.tensor(request)
        self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._world.host, async_op=True), flag
        return answer
