"""Planned memory, compared with the peak of a whole step and with the shards of ViT-H/16 on the meta device.

The ranks are simulated: this process is one rank of a group whose collectives do nothing.
"""

import warnings

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from ijepa.config.recipe import Recipe
from ijepa.distributed.local_tensors import to_local
from ijepa.distributed.process_group import World
from ijepa.masking.batch import Batch
from ijepa.model.float8 import frozen_layers, to_float8
from ijepa.model.ijepa import IJEPA
from ijepa.planning.activations import activations
from ijepa.planning.memory import STRATEGIES, State, divisors, fit, state
from ijepa.planning.size import count_parameters
from ijepa.training.optimizer import apply_step, make_optimizer, trained
from ijepa.training.parallelize import DistributedModel, parallelize, shard
from tests.helpers.plans import batch, model, simulated_rank
from tests.reference.memory import Alive

RANKS = 8


def recipe() -> Recipe:
    return Recipe.read({"steps": 10, "schedule": {"warmup": "1 steps"}, "model": model().model_dump()}, "test")


def peak_of_second_step(spread: DistributedModel, packed: Batch, micro_batches: int, autocast: bool) -> int:
    """Peak bytes of the second step, which has the moments of the first."""
    optimizer = make_optimizer(spread.model, recipe().optimizer)
    start = sum(to_local(p).numel() * p.element_size() for p in spread.model.parameters())
    with Alive() as alive:
        for _ in range(2):
            alive.peak = 0
            for number in range(micro_batches):
                forward = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
                spread.backward(packed, forward, last=number == micro_batches - 1)
            apply_step(spread.model, optimizer, 0.99, None)
    return start + alive.peak


@pytest.mark.parametrize(
    ("strategy", "micro_batches", "autocast"),
    [("none", 1, True), ("none", 2, False), ("zero2", 1, True), ("zero2", 2, True), ("zero3", 2, True)],
)
def test_state_peak_is_the_peak_of_a_step(strategy, micro_batches, autocast):
    chosen, ranks = recipe(), 1 if strategy == "none" else 2
    packed, tokens = batch(chosen.model)
    with simulated_rank(0, ranks), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shards",)) if ranks > 1 else None
        world = World(strategy, 0, 2, 0, mesh) if ranks > 1 else World()
        spread = parallelize(chosen, torch.device("cpu"), world, autocast=autocast)
        found = peak_of_second_step(spread, packed, micro_batches, autocast)
    held = state(count_parameters(chosen), strategy, ranks, autocast=autocast)
    each = activations(chosen.model, tokens, "none", autocast=autocast, with_scores=True)
    planned = held.peak(each.peak(len(tokens.context)), several=micro_batches > 1)
    assert planned == pytest.approx(found, rel=0.05)


def test_state_divides_what_ranks_share():
    parameters = count_parameters(recipe())
    states = {name: state(parameters, name, 8) for name in STRATEGIES}
    assert states["none"].kept == states["ddp"].kept == 16 * parameters.trained + 4 * parameters.encoder
    assert states["none"].kept == parameters.state_bytes
    assert states["zero2"].kept == states["zero3"].kept == pytest.approx(states["none"].kept / 8, rel=1e-3)
    assert states["zero3"].gathered < states["zero2"].gathered
    assert state(parameters, "zero2", 1) == states["none"]


def test_fit_is_the_largest_divisor_that_fits():
    held = State(
        *[1000] * 5,
        early_gradients=500,
        early_gradients_single=0,
        late_gradients=500,
        late_gradients_single=0,
    )
    shape = model()
    each = activations(shape, batch(shape)[1], "none")
    one = each.peak(1)
    assert list(divisors(48)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert fit(held, "none", each, 48, 13 * one).micro == 12
    assert fit(held, "none", each, 48, 49 * one).micro_batches == 1
    none = fit(held, "none", each, 48, one / 2)
    assert none.micro == none.micro_batches == 0 and none.peak > one / 2


def bytes_of_rank(chosen: Recipe, strategy: str, rank: int) -> dict[str, int]:
    """Bytes of one rank's weights, target encoder, gradients and moments, after a step of the optimizer."""
    shape, names = ((2, 4), ("copies", "shards")) if strategy == "hsdp" else ((RANKS,), ("shards",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    with torch.device("meta"):
        whole = IJEPA(chosen.model, chosen.seed)
    shard(whole, World(strategy, rank, RANKS, rank, mesh), True)
    optimizer = make_optimizer(whole, chosen.optimizer, fused=False)
    own = [tensor for _, _, tensor in trained(whole, optimizer)]
    for tensor in own:
        tensor.grad = torch.empty_like(tensor)
    optimizer.step()
    moments = [optimizer.state[tensor][key] for tensor in own for key in ("exp_avg", "exp_avg_sq")]
    target = [to_local(parameter) for parameter in whole.target_encoder.parameters()]
    parts = {"weights": own, "target": target, "gradients": [t.grad for t in own], "moments": moments}
    return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in parts.items()}


@pytest.mark.parametrize(("strategy", "shards", "ranks"), [("zero2", 8, range(8)), ("hsdp", 4, [5])])
def test_state_is_the_sum_of_the_shards(strategy, shards, ranks):
    chosen = Recipe.load("vit-huge-16-in22k")
    planned = state(count_parameters(chosen), strategy, shards)
    sums = dict.fromkeys(("weights", "target", "gradients", "moments"), 0)
    for rank in ranks:
        with simulated_rank(rank, RANKS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = bytes_of_rank(chosen, strategy, rank)
        for name, size in found.items():
            sums[name] += size
            assert getattr(planned, name) == pytest.approx(size, rel=0.02)
    for name, size in sums.items():
        assert len(ranks) * getattr(planned, name) == pytest.approx(size, rel=0.02)
    assert len(ranks) * planned.kept == pytest.approx(sum(sums.values()), rel=0.02)


def test_state_counts_the_float8_copy_and_shares_its_float32_weights():
    pytest.importorskip("torchao")
    chosen = Recipe.load("vit-huge-16-in22k")
    parameters = count_parameters(chosen)
    with_float8, without = (state(parameters, "zero2", RANKS, float8=float8) for float8 in (True, False))
    with simulated_rank(3, RANKS):
        with torch.device("meta"):
            whole = IJEPA(chosen.model, chosen.seed)
        to_float8(whole)
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shards",))
        shard(whole, World("zero2", 3, RANKS, 3, mesh), True)
        copies = sum(layer.weight8.numel() for layer in frozen_layers(whole.target_encoder))
        own = sum(4 * to_local(parameter).numel() for parameter in whole.target_encoder.parameters())
    assert with_float8.gathered - without.gathered == pytest.approx(copies, rel=0.02)
    assert with_float8.target == pytest.approx(own, rel=0.02)
