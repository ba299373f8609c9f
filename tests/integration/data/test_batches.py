"""Batches depend on the seed and their number only, not on workers, ranks, micro-batches or resumes."""

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from ijepa.data.loading.decode import decode_for
from ijepa.data.loading.loader import Loader, LoaderConfig
from ijepa.data.loading.shuffle import Order
from ijepa.data.open import open_dataset
from ijepa.masking.batch import Batch, Sequences
from ijepa.masking.masks import MaskRule
from ijepa.masking.packing import Packer
from tests.helpers.images import write_shards

IMAGES, GLOBAL, STEPS = 21, 8, 6  # two epochs and a bit
GRID = (6, 8)
ORDERS = {"global": Order(3, IMAGES), "blocks": Order(3, IMAGES, "blocks", block=4, window=2)}
PACKER = Packer(MaskRule(targets=3, min_context=4), GRID, seed=3, global_batch=GLOBAL, depth=4, drop_path=0.6)
CELLS = list(product(range(5), (1, 2, 4)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_dataset(write_shards(tmp_path_factory.mktemp("shards"), [9, 8, 4]))


def runs(sequences: Sequences) -> list[list[int]]:
    ends = sequences.cu_seqlens.tolist()
    return [sequences.index[a:b].tolist() for a, b in pairwise(ends)]


def images(batch: Batch) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield (position, all data of the image in the batch) of each image, independent of the other images."""
    patches = GRID[0] * GRID[1]
    context, blocks = runs(batch.context), runs(batch.targets)
    weights = np.split(batch.loss_weight.numpy(), batch.targets.cu_seqlens[1:-1].numpy())
    starts = batch.context.cu_seqlens.tolist()
    kept = [set(range(starts[-1])) if layer is None else set(layer.index.tolist()) for layer in batch.drop_path_rows]
    for slot, (position, sample) in enumerate(zip(batch.positions, batch.indices, strict=True)):
        mine = [b for b, block in enumerate(blocks) if block[0] // patches == slot]
        yield (
            position,
            (
                sample,
                batch.pixels[slot].numpy().tobytes(),
                [patch - slot * patches for patch in context[slot]],
                [[patch - slot * patches for patch in blocks[b]] for b in mine],
                [weights[b].tolist() for b in mine],
                [starts[slot] in rows for rows in kept],
            ),
        )


def samples(
    source, order: Order, world: int, micro: int, workers: int, begin: int = 0, **options: int
) -> dict[int, tuple[Any, ...]]:
    """Position -> the data of its image, from all ranks' batches from step `begin` on."""
    found = {}
    for rank in range(world):
        config = LoaderConfig(
            seed=order.seed,
            global_batch=GLOBAL,
            micro_batch=micro,
            rank=rank,
            world_size=world,
            image_size=(24, 32),
            crop_scale=(0.3, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            workers=workers,
            **options,
        )
        loader = Loader(source, config, PACKER, order)
        for batch in loader.iterate(begin, STEPS):
            for position, image in images(batch):
                assert position not in found
                found[position] = image
    return found


@pytest.fixture(scope="module", params=ORDERS)
def whole(source, request):
    """The order, and all images loaded by one process and one rank with one batch per step."""
    order = ORDERS[request.param]
    return order, samples(source, order, 1, GLOBAL, 0)


def test_epochs_contain_every_image_once_with_new_draws(whole):
    _, found = whole
    assert sorted(found) == list(range(GLOBAL * STEPS))
    for epoch in range(GLOBAL * STEPS // IMAGES):  # across borders of batches
        seen = [found[p][0] for p in range(epoch * IMAGES, (epoch + 1) * IMAGES)]
        assert sorted(seen) == list(range(IMAGES))
    masks, layers = [str(image[2:4]) for image in found.values()], [str(image[5]) for image in found.values()]
    assert len(set(masks)) > 40 and len(set(layers)) > 3


@pytest.mark.parametrize(("workers", "world"), CELLS)
def test_batches_do_not_depend_on_workers_ranks_micro_batches_or_resumes(source, whole, workers, world):
    """Resumed at step 2, within an epoch; then two epochs end within a batch."""
    order, wanted = whole
    micro = min([4, 8, 2, 1, 4][workers], GLOBAL // world)
    found = samples(source, order, world, micro, workers, begin=2)
    assert found == {position: wanted[position] for position in range(2 * GLOBAL, STEPS * GLOBAL)}


@pytest.mark.parametrize("crops", [2, 4, 8])
@pytest.mark.parametrize(("workers", "world"), [(0, 1), (0, 4), (2, 2)])
def test_batches_with_several_crops_per_decode(source, whole, crops, workers, world):
    """The sample is that of p // crops, also across borders of micro-batches; other data belong to position p."""
    order, single = whole
    wanted = samples(source, order, 1, GLOBAL, 0, crops_per_decode=crops)
    for position, (sample, pixels, *drawn) in wanted.items():
        assert sample == order.indices(position // crops)[0]
        assert drawn == list(single[position][2:])
        if position % crops:
            assert pixels != wanted[position - 1][1]
    found = samples(source, order, world, 2, workers, begin=2, crops_per_decode=crops)
    assert found == {position: wanted[position] for position in range(2 * GLOBAL, STEPS * GLOBAL)}


def test_several_crops_decode_an_image_once(source, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "ijepa.data.loading.loader.decode_for", lambda *given: decoded.append(given) or decode_for(*given)
    )
    samples(source, ORDERS["global"], 1, GLOBAL, 0, crops_per_decode=4)
    assert len(decoded) == GLOBAL * STEPS // 4


def test_orders_differ():
    positions = np.arange(IMAGES)
    assert not np.array_equal(*(order.indices(positions) for order in ORDERS.values()))
