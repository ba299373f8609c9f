"""Evaluation by several processes: each makes the features of its own batches, all hold all of them in the end.

Under torchrun the command runs once on every device. Batches are dealt out whole, in turns, so that every forward pass
sees the images that one process would give it, and the result is the same on any number of processes. What is
gathered travels as bytes over gloo: whoever has not made a row holds zeros there, and the sum is the row. Heads are
then trained alike by every process on its own device; process 0 alone writes and talks.

Every process holds all features: for ImageNet-1K and four blocks of ViT-H in float16, 13 GB.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ijepa.utils.errors import RunError

Tensors = tuple[Tensor, ...]

_PIECE = 64 * 2**20
"""Bytes that travel at once."""
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among `size` that evaluate together."""

    rank: int = 0
    size: int = 1

    def rows(self, count: int, batch: int) -> npt.NDArray[np.int64]:
        """Return which of `count` rows this process makes: every `size`-th batch of so many."""
        places = np.arange(count)
        return places[places // batch % self.size == self.rank]

    def share(self, x: Tensor) -> Tensor:
        """Fill in, in place, the rows of `x` that other processes have made and that are zero here; return it."""
        if self.size > 1 and x.numel():
            for piece in x.view(-1).view(torch.uint8).split(_PIECE):
                dist.all_reduce(piece)
        return x

    def whole(self, made: list[Tensor], rows: npt.NDArray[np.int64], count: int) -> Tensor:
        """Return all `count` rows, of which this process has made those numbered `rows`, in `made`'s parts."""
        if self.size == 1:
            return torch.cat(made)
        kinds: list[tuple[torch.Size, torch.dtype] | None] = [None] * self.size
        dist.all_gather_object(kinds, (made[0].shape[1:], made[0].dtype) if made else None)
        shape, dtype = next(kind for kind in kinds if kind is not None)
        x = torch.zeros(count, *shape, dtype=dtype)
        if made:
            x[torch.from_numpy(rows)] = torch.cat(made)
        return self.share(x)

    def dealt(self, count: int, make: Callable[[Iterable[int]], Iterator[Tensors]]) -> Iterator[Tensors]:
        """Yield what `make` yields for the numbers 0 to `count`, in order: each process makes its share, all get all.

        Unlike `whole`, nothing is held longer than a turn: for what would not fit into memory together.

        Args:
            count: of batches.
            make: from numbers to one tuple of tensors for each.

        Raises:
            RunError: what `make` raised, on every process.
        """
        if self.size == 1:
            yield from make(range(count))
            return
        own = make(range(self.rank, count, self.size))
        for first in range(0, count, self.size):
            made = _next(own) if first + self.rank < count else ()
            yield from self._exchanged(made)[: count - first]

    def _exchanged(self, made: Tensors | RunError) -> list[Tensors]:
        """Return every process's tensors; raise the first failure on all."""
        forms: list[Any] = [None] * self.size
        mine = made if isinstance(made, RunError) else [(values.shape, values.dtype) for values in made]
        dist.all_gather_object(forms, mine)
        for form in forms:
            if isinstance(form, RunError):
                raise form
        found = []
        for source, form in enumerate(forms):
            own = source == self.rank and not isinstance(made, RunError)
            tensors = made if own else tuple(torch.empty(shape, dtype=dtype) for shape, dtype in form)
            assert not isinstance(tensors, RunError)
            for values in tensors:
                dist.broadcast(values, source)
            found.append(tensors)
        return found

    def all_agree(self, mine: bool) -> bool:
        """Whether it is so on every process."""
        if self.size == 1:
            return mine
        flag = torch.tensor(int(mine))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)


ALONE = Ranks()


def _next(own: Iterator[Tensors]) -> Tensors | RunError:
    try:
        return tuple(values.cpu().contiguous() for values in next(own))
    except RunError as error:
        return error


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that torchrun has started, for as long as the context lasts; alone, do nothing.

    A group of processes that exists already is used and left as it is.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
        dist.barrier()  # nobody leaves while another still sends
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """Where this process computes: the GPU of its own, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
