import pickle
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from ijepa.data.loading.crop import WORDS, crop_resize, random_resized_crop_box
from ijepa.data.loading.decode import decode
from ijepa.data.loading.loader import Loader, LoaderConfig
from ijepa.data.loading.shuffle import sample_indices
from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Source
from ijepa.masking.batch import Batch
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.random import Stream, random_bits
from tests.helpers.images import bare_batch, jpeg, write_shards, write_tar, write_tree

SCALE, RATIO, SIZE, SEED = (0.3, 1.0), (3 / 4, 4 / 3), (16, 20), 3


def loader(source: Source, **changes) -> Loader:
    collate = changes.pop("collate", bare_batch)
    return Loader(source, config(**changes), collate)


def config(**changes) -> LoaderConfig:
    options = {"seed": SEED, "global_batch": 8, "micro_batch": 2} | changes
    return LoaderConfig(image_size=SIZE, crop_scale=SCALE, crop_ratio=RATIO, **options)


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def images(batches: list[Batch]) -> dict[int, tuple[int, torch.Tensor]]:
    """position -> (sample index, pixels)."""
    return {
        position: (index, pixels)
        for batch in batches
        for position, index, pixels in zip(batch.positions, batch.indices, batch.pixels, strict=True)
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [9, 8, 4])


@pytest.fixture
def source(shards) -> Source:
    return open_dataset(shards)


def test_iterate_images_are_functions_of_their_positions(source):
    """Compared with a slow pipeline: 21 samples and batches of 8, so eight steps have three epochs."""
    found = images(list(loader(source).iterate(0, 8)))
    assert sorted(found) == list(range(64))
    for position, (index, pixels) in found.items():
        assert index == sample_indices(SEED, position, 21)[0]
        image = decode(source[index].image)
        draw = random_bits(SEED, Stream.CROP, position, WORDS)[0]
        box = random_resized_crop_box(draw, image.shape[0], image.shape[1], SCALE, RATIO)
        assert torch.equal(pixels, crop_resize(image, box, SIZE))
    for epoch in range(3):
        assert sorted(found[p][0] for p in range(epoch * 21, epoch * 21 + 21)) == list(range(21))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_iterate_does_not_depend_on_workers_or_resumes(source, workers):
    expected = list(loader(source).iterate(0, 7))  # step 2 contains the end of an epoch
    assert len(expected) == 28
    found = list(loader(source, workers=workers).iterate(0, 7))
    assert len(found) == 28 and all(map(same, expected, found))
    for start in (1, 2, 5):
        resumed = list(loader(source, workers=workers, prefetch=1).iterate(start, 7))
        assert len(resumed) == 28 - 4 * start and all(map(same, expected[4 * start :], resumed))


@pytest.mark.parametrize(("world", "micro", "workers"), [(1, 8, 0), (2, 2, 0), (2, 4, 2), (4, 1, 0), (4, 2, 1)])
def test_iterate_divides_the_same_global_batches(source, world, micro, workers):
    expected = images(list(loader(source).iterate(1, 5)))
    found = {}
    for rank in range(world):
        team = loader(source, world_size=world, rank=rank, micro_batch=micro, workers=workers)
        mine = list(team.iterate(1, 5))
        assert len(mine) == 4 * team.config.micro_batches == 4 * 8 // (world * micro)
        for step in range(4):  # the part of a rank in each global batch is contiguous
            part = mine[step * team.config.micro_batches : (step + 1) * team.config.micro_batches]
            start = (step + 1) * 8 + rank * 8 // world
            assert [p for batch in part for p in batch.positions] == list(range(start, start + 8 // world))
        found |= images(mine)
    assert found.keys() == expected.keys()
    assert all(found[p][0] == i and torch.equal(found[p][1], x) for p, (i, x) in expected.items())


def test_iterate_more_workers_than_batches_and_no_batches(source):
    expected = list(loader(source, global_batch=2).iterate(3, 5))
    assert all(map(same, expected, loader(source, global_batch=2, workers=3, prefetch=4).iterate(3, 5)))
    assert list(loader(source, workers=2).iterate(4, 4)) == []


def test_iterate_returns_copies(source):
    iterator = loader(source, workers=1, prefetch=1).iterate(0, 3)
    first = next(iterator)
    copy = first.pixels.clone()
    first.pixels.add_(1)
    for batch in iterator:
        batch.pixels.zero_()
    assert torch.equal(first.pixels, copy + 1)


def test_dataset_pickle_is_small(source):
    assert len(pickle.dumps(loader(source).dataset)) < 2000


def test_config_positions_and_errors():
    plan = config(global_batch=12, micro_batch=2, rank=1, world_size=3)
    assert plan.micro_batches == 2
    assert [plan.positions(k).tolist() for k in (0, 1, 2)] == [[4, 5], [6, 7], [16, 17]]
    with pytest.raises(UserError, match="5 ranks"):
        config(global_batch=12, world_size=5)
    with pytest.raises(ValueError, match="rank 3 of 3"):
        config(global_batch=12, rank=3, world_size=3)


# Unreadable images


@pytest.fixture
def damaged(tmp_path) -> Source:
    """Twelve images: 3 and 4 are truncated, 7 is empty."""
    members = [(f"{i:02d}.jpg", jpeg(i)) for i in range(12)]
    for i, keep in ((3, 100), (4, -40), (7, 0)):
        members[i] = (members[i][0], members[i][1][:keep])
    return open_dataset(write_tar(tmp_path / "a.tar", members))


@pytest.mark.parametrize("workers", [0, 2])
def test_iterate_replaces_unreadable_images_by_the_next_of_the_epoch(damaged, workers):
    batches = list(loader(damaged, workers=workers, global_batch=6, micro_batch=3).iterate(0, 8))
    bad, n = {3, 4, 7}, 12
    for batch in batches:
        names = []
        for slot, position in enumerate(batch.positions):
            epoch, place = divmod(position, n)
            order = sample_indices(SEED, np.arange(n) + epoch * n, n).tolist()
            steps = [order[(place + k) % n] for k in range(n)]
            good = next(i for i in steps if i not in bad)
            names += [f"a.tar/{i:02d}.jpg" for i in steps[: steps.index(good)]]
            assert batch.indices[slot] == good
            draw = random_bits(SEED, Stream.CROP, position, WORDS)[0]  # the crop of the position, not of the sample
            box = random_resized_crop_box(draw, 40, 52, SCALE, RATIO)
            assert torch.equal(batch.pixels[slot], crop_resize(decode(jpeg(good)), box, SIZE))
        assert list(batch.replaced) == names
    assert {name for batch in batches for name in batch.replaced} == {f"a.tar/{i:02d}.jpg" for i in bad}


@pytest.mark.parametrize("workers", [0, 1])
def test_iterate_fails_after_too_many_unreadable_images(tmp_path, workers):
    source = open_dataset(write_tree(tmp_path, {f"{i}.jpg": b"no image" for i in range(20)}))
    with pytest.raises(RunError, match="4 images") as error:
        list(loader(source, workers=workers, max_replaced_attempts=3).iterate(0, 1))
    line = str(error.value)
    assert "\n" not in line and line.count(".jpg") == 4
    few = open_dataset(write_tree(tmp_path / "few", {f"{i}.jpg": b"no image" for i in range(2)}))
    with pytest.raises(RunError, match="2 images"):
        list(loader(few).iterate(0, 1))
