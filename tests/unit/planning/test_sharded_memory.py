"""A plan's memory beside the real shards of the real model: ViT-H/16 on the meta device, eight ranks simulated."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ijepa.config.recipe import Recipe
from ijepa.distributed.local_tensors import to_local
from ijepa.distributed.process_group import World
from ijepa.model.float8 import frozen_layers, to_float8
from ijepa.model.ijepa import IJEPA
from ijepa.planning.memory import state
from ijepa.planning.size import count_parameters
from ijepa.training.optimizer import make_optimizer, trained
from ijepa.training.parallelize import shard

RANKS = 8


@pytest.fixture
def rank():
    """Makes this process one rank of eight whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(number: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=number, world_size=RANKS, store=FakeStore())

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def held(recipe: Recipe, strategy: str, number: int) -> dict[str, int]:
    """Bytes of one rank's weights, target encoder, gradients and moments, after a step of the optimiser."""
    shape, names = ((2, 4), ("copies", "shards")) if strategy == "hsdp" else ((RANKS,), ("shards",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    with torch.device("meta"):
        model = IJEPA(recipe.model, recipe.seed)
    shard(model, World(strategy, number, RANKS, number, mesh), True)
    optimizer = make_optimizer(model, recipe.optimizer, fused=False)
    own = [tensor for _, _, tensor in trained(model, optimizer)]
    for tensor in own:
        tensor.grad = torch.empty_like(tensor)
    optimizer.step()
    moments = [optimizer.state[tensor][key] for tensor in own for key in ("exp_avg", "exp_avg_sq")]
    target = [to_local(parameter) for parameter in model.target_encoder.parameters()]
    parts = {"weights": own, "target": target, "gradients": [t.grad for t in own], "moments": moments}
    return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in parts.items()}


@pytest.mark.parametrize(("strategy", "shards", "ranks"), [("zero2", 8, range(8)), ("hsdp", 4, [5])])
def test_the_plan_is_the_sum_of_shards(strategy, shards, ranks, rank):
    recipe = Recipe.load("vit-huge-16-in22k")
    planned = state(count_parameters(recipe), strategy, shards)
    sums = dict.fromkeys(("weights", "target", "gradients", "moments"), 0)
    for number in ranks:
        rank(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = held(recipe, strategy, number)
        for name, size in found.items():
            sums[name] += size
            assert getattr(planned, name) == pytest.approx(size, rel=0.02)
    for name, size in sums.items():
        assert len(ranks) * getattr(planned, name) == pytest.approx(size, rel=0.02)
    assert len(ranks) * planned.kept == pytest.approx(sum(sums.values()), rel=0.02)


def test_the_float8_copy_is_counted_and_its_float32_weights_are_shared(rank):
    pytest.importorskip("torchao")
    recipe = Recipe.load("vit-huge-16-in22k")
    parameters, (zero2, plain) = count_parameters(recipe), ({"float8": True}, {})
    rank(3)
    with torch.device("meta"):
        model = IJEPA(recipe.model, recipe.seed)
    to_float8(model)
    shard(model, World("zero2", 3, RANKS, 3, init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shards",))), True)
    planned = [state(parameters, "zero2", RANKS, **how) for how in (zero2, plain)]
    copies = sum(layer.weight8.numel() for layer in frozen_layers(model.target_encoder))
    assert planned[0].gathered - planned[1].gathered == pytest.approx(copies, rel=0.02)
    own = sum(4 * to_local(parameter).numel() for parameter in model.target_encoder.parameters())
    assert planned[0].target == pytest.approx(own, rel=0.02)
