"""One property of the whole pipeline: a batch depends on the seed and its number, and on nothing else."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from ijepa.data.loader import Loader
from ijepa.data.order import Order
from ijepa.data.sources import open_source
from tests.data.making import bare_batch, write_shards

IMAGES, GLOBAL, STEPS = 21, 8, 8  # three epochs and a bit
ORDERS = {"global": Order(3, IMAGES), "blocks": Order(3, IMAGES, "blocks", block=4, window=2)}
WAYS = [(1, 4, 0), (1, 8, 1), (1, 2, 2), (1, 1, 3), (1, 4, 4), (2, 4, 0), (2, 1, 2), (4, 2, 0), (4, 1, 1)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(write_shards(tmp_path_factory.mktemp("shards"), [9, 8, 4]))


def samples(source, order: Order, world: int, micro: int, workers: int, cuts: list[int]) -> dict[int, tuple]:
    """position -> (sample, pixels) of all ranks' batches, in runs of steps that are each begun anew."""
    found = {}
    for rank in range(world):
        loader = Loader(
            source,
            seed=order.seed,
            order=order,
            global_batch=GLOBAL,
            micro_batch=micro,
            rank=rank,
            world_size=world,
            image_size=(16, 20),
            crop_scale=(0.3, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            collate=partial(bare_batch),
            workers=workers,
        )
        for begin, end in pairwise(cuts):
            for batch in loader.iterate(begin, end):
                for slot, (position, index) in enumerate(zip(batch.positions, batch.indices, strict=True)):
                    assert position not in found
                    found[position] = (index, batch.pixels[slot].clone())
    return found


@pytest.mark.parametrize("kind", ORDERS)
def test_workers_ranks_micro_batches_and_interruptions_leave_no_trace(source, kind):
    order = ORDERS[kind]
    wanted = samples(source, order, 1, GLOBAL, 0, [0, STEPS])
    assert sorted(wanted) == list(range(GLOBAL * STEPS))
    for epoch in range(GLOBAL * STEPS // IMAGES):  # every image once an epoch, across batches' borders
        seen = [wanted[p][0] for p in range(epoch * IMAGES, (epoch + 1) * IMAGES)]
        assert sorted(seen) == list(range(IMAGES))
    for way in WAYS:
        found = samples(source, order, *way, cuts=[0, 3, 4, STEPS])
        assert sorted(found) == sorted(wanted), way
        assert all(found[p][0] == wanted[p][0] and torch.equal(found[p][1], wanted[p][1]) for p in wanted), way


def test_the_orders_differ(source):
    positions = np.arange(IMAGES)
    assert not np.array_equal(*(order.indices(positions) for order in ORDERS.values()))
