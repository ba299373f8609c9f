"""The part of a tensor that this rank holds. Weights are cut by rows; a tensor that is not cut is its own part.

torch's `DTensor` takes most of a second to import, so a run on one process does not.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is cut over ranks."""
    module = sys.modules.get("torch.distributed.tensor")  # what was never imported has no instances
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds; the same memory."""
    whole: Any = tensor
    return whole.to_local() if is_sharded(tensor) else tensor


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Return [start, stop), the rows of a tensor that this rank holds."""
    count = tensor.shape[0] if tensor.ndim else 1
    if not is_sharded(tensor):
        return 0, count
    whole: Any = tensor
    return share(count, whole.device_mesh)


def share(count: int, mesh: Any) -> tuple[int, int]:
    """Return [start, stop), this rank's share of `count` rows: as many for every rank as long as there are some."""
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)  # copies are along the dimension before
    a_rank = -(-count // size)
    return min(rank * a_rank, count), min((rank + 1) * a_rank, count)


def as_sharded(part: Tensor, like: Tensor, mesh: Any = None) -> Tensor:
    """Return this rank's `part` as a tensor that is cut as `like` is, over another `mesh` of its form if given."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    whole: Any = like
    return DTensor.from_local(
        part, mesh or whole.device_mesh, whole.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def place(model: nn.Module, values: Mapping[str, Callable[[], Tensor]]) -> None:
    """Copy this rank's rows of each value into the tensor of that name in `model`, in place."""
    tensors = model.state_dict()
    for name, make in values.items():
        begin, end = rows_of(tensors[name])
        value = make()
        local(tensors[name]).copy_(value[begin:end] if value.ndim else value)
