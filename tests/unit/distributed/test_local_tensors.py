"""This rank's rows of tensors; the sharded ones are on simulated ranks, whose collectives do nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ijepa.distributed.local_tensors import as_sharded, copy_shards, is_sharded, local_rows, shard_range, to_local
from tests.helpers.plans import simulated_rank


def mesh(ranks: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(ndim=1, size=lambda axis: ranks, get_local_rank=lambda axis: rank)


@pytest.mark.parametrize(
    ("count", "ranks", "ranges"),
    [
        (8, 2, [(0, 4), (4, 8)]),
        (5, 3, [(0, 2), (2, 4), (4, 5)]),
        (3, 4, [(0, 1), (1, 2), (2, 3), (3, 3)]),
        (1, 3, [(0, 1), (1, 1), (1, 1)]),
    ],
)
def test_shard_range_cuts_rows_as_torch_chunk_does(count, ranks, ranges):
    found = [shard_range(count, mesh(ranks, rank)) for rank in range(ranks)]
    assert found == ranges
    sizes = [len(part) for part in torch.arange(count).chunk(ranks)]
    assert [stop - start for start, stop in found if stop > start] == sizes


def test_tensor_that_is_not_sharded_is_its_own_part():
    tensor = torch.zeros(6, 2)
    assert not is_sharded(tensor) and to_local(tensor) is tensor
    assert local_rows(tensor) == (0, 6) and local_rows(torch.tensor(1.0)) == (0, 1)
    assert as_sharded(tensor, tensor) is tensor


@pytest.mark.parametrize(("rank", "rows"), [(0, (0, 2)), (2, (4, 5))])
def test_local_rows_and_copy_shards_of_a_sharded_model(rank, rows):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with simulated_rank(rank, 3):
        over = init_device_mesh("cpu", (3,))
        model = nn.Module()
        model.register_parameter("weight", nn.Parameter(distribute_tensor(torch.zeros(5, 2), over, [Shard(0)])))
        model.register_parameter("scale", nn.Parameter(torch.zeros(())))
        values = torch.arange(10.0).view(5, 2)
        copy_shards(model, {"weight": lambda: values, "scale": lambda: torch.tensor(3.0)})
        assert is_sharded(model.weight) and local_rows(model.weight) == rows
        assert torch.equal(to_local(model.weight), values[slice(*rows)]) and model.scale.item() == 3
        part = as_sharded(values[slice(*rows)], model.weight)
        assert part.shape == (5, 2) and torch.equal(to_local(part), values[slice(*rows)])
