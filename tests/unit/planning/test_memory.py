"""A whole step's peak beside the plan's: on one process, and on one rank of two whose collectives do nothing."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from ijepa.config.recipe import Recipe
from ijepa.distributed.process_group import World
from ijepa.masking.batch import Batch
from ijepa.planning.activations import activations
from ijepa.planning.memory import STRATEGIES, State, divisors, fit, state
from ijepa.planning.size import count_parameters
from ijepa.training.optimizer import apply_step, make_optimizer
from ijepa.training.parallelize import DistributedModel, parallelize
from tests.helpers.plans import batch, model
from tests.reference.memory import Alive


def recipe() -> Recipe:
    return Recipe.read({"steps": 10, "schedule": {"warmup": "1 steps"}, "model": model().model_dump()}, "test")


@contextmanager
def world(strategy: str) -> Iterator[World]:
    if strategy == "none":
        yield World()
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield World(strategy, 0, 2, 0, init_device_mesh("cpu", (2,), mesh_dim_names=("shards",)))
    finally:
        dist.destroy_process_group()


def measured(spread: DistributedModel, packed: Batch, micro_batches: int, autocast: bool) -> int:
    """Bytes at the peak of the second step, in which moments are there."""
    chosen = recipe()
    optimizer = make_optimizer(spread.model, chosen.optimizer)
    start = sum(p.numel() * p.element_size() for p in spread.model.parameters())
    if spread.world.mesh is not None:
        start = sum(p.to_local().numel() * p.element_size() for p in spread.model.parameters())
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
def test_the_peak_of_a_step(strategy, micro_batches, autocast):
    chosen = recipe()
    packed, tokens = batch(chosen.model)
    with world(strategy) as here, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spread = parallelize(chosen, torch.device("cpu"), here, autocast=autocast)
        found = measured(spread, packed, micro_batches, autocast)
    held = state(count_parameters(chosen), strategy, 1 if strategy == "none" else 2, autocast=autocast)
    each = activations(chosen.model, tokens, "none", autocast=autocast, with_scores=True)
    planned = held.peak(each.peak(len(tokens.context)), several=micro_batches > 1)
    assert planned == pytest.approx(found, rel=0.05)


def test_what_is_shared_is_divided_and_the_rest_is_not():
    parameters = count_parameters(recipe())
    rows = {name: state(parameters, name, 8) for name in STRATEGIES}
    assert rows["none"].kept == rows["ddp"].kept == 16 * parameters.trained + 4 * parameters.encoder
    assert rows["zero2"].kept == rows["zero3"].kept == pytest.approx(rows["none"].kept / 8, rel=1e-3)
    assert rows["zero3"].gathered < rows["zero2"].gathered
    assert state(parameters, "zero2", 1) == rows["none"]


def test_the_largest_micro_batch_is_a_divisor_that_just_fits():
    held = State(*[1000] * 5, added=500, added_once=0, ended=500, ended_once=0)
    shape = model()
    each = activations(shape, batch(shape)[1], "none")
    one = each.peak(1)
    assert sorted(divisors(48)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert fit(held, "none", each, 48, 13 * one).micro == 12
    assert fit(held, "none", each, 48, 49 * one).micro_batches == 1
    none = fit(held, "none", each, 48, one / 2)
    assert none.micro == none.micro_batches == 0 and none.peak > one / 2
