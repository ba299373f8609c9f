"""The part of a tensor that this rank holds. Weights are cut by rows; a tensor that is not cut is its own part."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Return [start, stop), the rows of a tensor that this rank holds."""
    count = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return 0, count
    mesh = tensor.device_mesh
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    a_rank = -(-count // size)
    return min(rank * a_rank, count), min((rank + 1) * a_rank, count)


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """Return this rank's `part` as a tensor that is cut as `like` is."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
