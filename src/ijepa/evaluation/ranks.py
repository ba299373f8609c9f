"""Evaluation under torchrun: the encoder's forward passes are dealt out, everything after them is done by all alike.

Batches go to ranks in turn, whole, and every rank is given all of their features in order. A batch is made by the same
products on any number of ranks, so a result is the same, bit for bit, as on one; what follows (heads, votes, clusters,
scores) is a small part of the work and is repeated by every rank, which keeps the rest of this room free of ranks. The
price is memory: what stands in a result for one process is taken by each.

Features travel through gloo, as they lie in main memory. A process without torchrun is a world of one.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ijepa.errors import Failed

T = TypeVar("T")
Tensors = tuple[Tensor, ...]


@contextmanager
def joined() -> Iterator[None]:
    """Be one of torchrun's processes, where it started this one; a group that there is already is used."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) < 2 or not dist.is_available() or dist.is_initialized()
    if not alone:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if not alone:
            dist.destroy_process_group()


def size() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this is; 0 writes and speaks."""
    return dist.get_rank() if size() > 1 else 0


def from_first(make: Callable[[], T]) -> T:
    """Return what the first rank makes; the others make nothing."""
    if size() == 1:
        return make()
    value = [make() if rank() == 0 else None]
    dist.broadcast_object_list(value)
    return value[0]  # type: ignore[return-value]


def dealt(count: int, make: Callable[[Iterable[int]], Iterator[Tensors]]) -> Iterator[Tensors]:
    """Yield what `make` yields for the numbers 0 to `count`, in order; each rank makes its share and is given all.

    Args:
        count: of batches.
        make: from numbers to one tuple of tensors for each.

    Raises:
        Failed: what `make` raised, on every rank.
    """
    ranks, mine = size(), rank()
    if ranks == 1:
        yield from make(range(count))
        return
    own = make(range(mine, count, ranks))
    for first in range(0, count, ranks):
        made = _next(own) if first + mine < count else ()
        yield from _exchanged(made)[: count - first]


def _next(own: Iterator[Tensors]) -> Tensors | Failed:
    try:
        return tuple(values.cpu().contiguous() for values in next(own))
    except Failed as error:
        return error


def _exchanged(made: Tensors | Failed) -> list[Tensors]:
    """Return every rank's tensors; raise the first rank's failure on all."""
    about: list[Any] = [None] * size()
    forms = made if isinstance(made, Failed) else [(values.shape, values.dtype) for values in made]
    dist.all_gather_object(about, forms)
    for told in about:
        if isinstance(told, Failed):
            raise told
    found = []
    for source, told in enumerate(about):
        mine = source == rank()
        tensors = made if mine else tuple(torch.empty(shape, dtype=dtype) for shape, dtype in told)
        assert not isinstance(tensors, Failed)
        for values in tensors:
            dist.broadcast(values, source)
        found.append(tensors)
    return found
