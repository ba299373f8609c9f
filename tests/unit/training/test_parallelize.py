"""A model on one process and on simulated ranks, whose collectives do nothing; test_distributed has real ranks."""

import warnings
from contextlib import nullcontext

import pytest
import torch

from ijepa.distributed.local_tensors import is_sharded, local_rows, to_local
from ijepa.distributed.process_group import World
from ijepa.model.ijepa import IJEPA
from ijepa.training.parallelize import parallelize
from tests.helpers.plans import simulated_rank
from tests.helpers.runs import batch_of, recipe

CPU = torch.device("cpu")


def test_parallelize_on_one_process_is_the_plain_model(tmp_path):
    chosen = recipe(tmp_path)
    model = parallelize(chosen, CPU, World(), autocast=False).model
    wanted = IJEPA(chosen.model, chosen.seed).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("rank", [0, 1])
def test_parallelize_gives_each_rank_its_rows_of_the_same_weights(tmp_path, strategy, rank):
    from torch.distributed.device_mesh import init_device_mesh

    chosen = recipe(tmp_path)
    wanted = IJEPA(chosen.model, chosen.seed).state_dict()
    with simulated_rank(rank, 2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = World(strategy, rank, 2, rank, init_device_mesh("cpu", (2,), mesh_dim_names=("shards",)))
        model = parallelize(chosen, CPU, world, autocast=False).model
        sharded = 0
        for name, tensor in model.named_parameters():
            start, stop = local_rows(tensor)
            sharded += is_sharded(tensor)
            assert torch.equal(to_local(tensor), wanted[name][start:stop]), name
        assert sharded == len(list(model.parameters()))


def test_backward_adds_the_gradients_of_micro_batches(tmp_path):

    chosen = recipe(tmp_path)
    batch = batch_of(chosen)
    spread = parallelize(chosen, CPU, World(), autocast=False)
    gradients = []
    for times in (1, 2):
        spread.model.zero_grad()
        for number in range(times):
            output = spread.backward(batch, nullcontext(), last=number == times - 1)
        assert output.loss.item() > 0
        gradients.append([p.grad.clone() for p in spread.model.parameters() if p.grad is not None])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, 2 * once)
