from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa.data.open import open_dataset
from ijepa.evaluation.features.sampling import choose, crops, hold_out, readable_crops
from ijepa.utils.errors import RunError
from tests.helpers.encoders import block_mask, write_pairs


def folder(root: Path, broken: set[int]) -> Path:
    images = write_pairs(root, [block_mask(i, 48) for i in range(8)]) / "images"
    for index, file in enumerate(sorted(images.iterdir())):
        if index in broken:
            file.write_bytes(file.read_bytes()[:40])
    return images


def test_readable_crops_replaces_an_unreadable_image_by_the_next_free_one(tmp_path: Path) -> None:
    source = open_dataset(folder(tmp_path, {2, 7}))
    pixels, chosen = readable_crops(source, [1, 2, 3, 7], (48, 48))
    assert chosen.tolist() == [1, 4, 3, 0]  # 4 replaces 2, because 3 is taken; 0 replaces 7, the last image
    assert torch.equal(pixels, crops(source, [1, 4, 3, 0], (48, 48)))
    with pytest.raises(RunError, match=source.name(2)):
        crops(source, [1, 2, 3, 7], (48, 48))


def test_readable_crops_returns_fewer_images_if_none_is_left(tmp_path: Path) -> None:
    source = open_dataset(folder(tmp_path, {0, 1, 5}))
    _, chosen = readable_crops(source, range(8), (48, 48))
    assert chosen.tolist() == [2, 3, 4, 6, 7]


def test_readable_crops_fails_without_any_readable_image(tmp_path: Path) -> None:
    source = open_dataset(folder(tmp_path, set(range(8))))
    with pytest.raises(RunError):
        readable_crops(source, [3, 5], (48, 48))


def test_hold_out_takes_a_share_at_least_one_and_not_all() -> None:
    held = hold_out(np.arange(30), 0.1, 0)
    assert held.sum() == 3
    assert (held != hold_out(np.arange(30), 0.1, 1)).any()
    assert hold_out(np.arange(30)[held], 0.1, 0).sum() == 1
    assert hold_out(np.arange(2), 0.99, 0).sum() == 1


def test_hold_out_takes_the_share_of_each_class() -> None:
    labels = np.repeat([3, 1, 7, 5, 9], [100, 40, 20, 10, 1])
    for seed in range(5):
        held = hold_out(np.arange(171), 0.1, seed, labels)
        assert held.sum() == 17
        for label, count in ((3, 10), (1, 4), (7, 2), (5, 1)):
            assert abs(held[labels == label].sum() - count) <= 1
        assert not held[labels == 9].any(), "the only image of a class stays in the train set"
    assert (hold_out(np.arange(171), 0.1, 0, labels) != hold_out(np.arange(171), 0.1, 1, labels)).any()
    assert hold_out(np.arange(3), 0.1, 0, np.arange(3)).sum() == 1, "one is held out even so"
    order = np.random.default_rng(0).permutation(171)
    shuffled = hold_out(np.arange(171)[order], 0.1, 0, labels[order])
    assert (shuffled == hold_out(np.arange(171), 0.1, 0, labels)[order]).all(), "drawn by sample number"


@given(st.integers(1, 5000), st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_choose_returns_distinct_ascending_numbers(total: int, count: int, seed: int) -> None:
    chosen = choose(total, count, seed)
    assert len(chosen) == min(total, count)
    assert (chosen[1:] > chosen[:-1]).all()
    assert chosen[0] >= 0
    assert chosen[-1] < total
    assert (chosen == choose(total, count, seed)).all()
