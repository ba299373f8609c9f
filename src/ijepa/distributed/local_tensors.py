"""The part of a tensor that this rank holds. Weights are sharded by rows; a tensor that is not sharded is its own part.

Importing torch's `DTensor` takes most of a second, so nothing here imports it on one process.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")  # if it was never imported, there are no instances
    return module is not None and isinstance(tensor, module.DTensor)


def to_local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, in the same memory."""
    whole: Any = tensor
    return whole.to_local() if is_sharded(tensor) else tensor


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Return the range [start, stop) of a tensor's rows that this rank holds."""
    count = tensor.shape[0] if tensor.ndim else 1
    if not is_sharded(tensor):
        return 0, count
    whole: Any = tensor
    return shard_range(count, whole.device_mesh)


def shard_range(count: int, mesh: Any) -> tuple[int, int]:
    """Return this rank's range [start, stop) of `count` rows, as FSDP cuts them: ceil(count / ranks) rows each.

    The last ranks may have fewer rows, or none.
    """
    # With hsdp, the first dimension of the mesh is the copies, and the last one the shards.
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    rows = -(-count // size)
    return min(rank * rows, count), min((rank + 1) * rows, count)


def as_sharded(part: Tensor, like: Tensor, mesh: Any = None) -> Tensor:
    """Return this rank's `part` as a tensor that is sharded as `like` is, over its mesh or one of the same shape."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    whole: Any = like
    return DTensor.from_local(
        part, mesh or whole.device_mesh, whole.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def copy_shards(model: nn.Module, values: Mapping[str, Callable[[], Tensor]]) -> None:
    """Copy this rank's rows of each value into the tensor of that name in `model`, in place."""
    tensors = model.state_dict()
    for name, make in values.items():
        start, stop = local_rows(tensors[name])
        value = make()
        to_local(tensors[name]).copy_(value[start:stop] if value.ndim else value)
