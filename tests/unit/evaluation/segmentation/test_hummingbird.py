from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from ijepa.data.open import open_dataset
from ijepa.data.sources.base import Source
from ijepa.evaluation.segmentation.dataset import Classes, SegmentationDataset
from ijepa.evaluation.segmentation.hummingbird import SoftBank, class_shares, draw_rare, largest
from ijepa.evaluation.segmentation.protocol import SoftRetrieval
from ijepa.utils.random import Stream, random_bits, uniform
from tests.helpers.encoders import MeanColor, block_mask, write_pairs
from tests.reference.segmentation import rare_patches, soft_labels

CLASSES = Classes(4, ("a", "b", "c", "d"), (255,))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Source:
    masks = [block_mask(i) for i in range(8)]
    masks[0][:8, :12] = 255
    return open_dataset(write_pairs(tmp_path_factory.mktemp("pairs") / "train", masks))


def dataset(source: Source, count: int = 8, classes: Classes = CLASSES) -> SegmentationDataset:
    return SegmentationDataset(source, np.arange(count), "--train", classes, 32, 32)


def test_class_shares_count_scored_pixels() -> None:
    labels = torch.tensor([[0, 0, 1, 255], [3, 3, 3, 3], [255, 255, 255, 255]])
    assert class_shares(labels, CLASSES)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert class_shares(labels, CLASSES)[1:].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    without = Classes(4, CLASSES.names, (0, 255))
    assert class_shares(labels, without)[0].tolist() == [0, 1, 0, 0]


def test_shares_agree_with_a_slow_version(train: Source) -> None:
    bank = SoftBank(MeanColor(), dataset(train), SoftRetrieval(neighbors=7, temperature=0.05))
    assert len(bank) == 8 * 16 - 1, "all pixels of one patch are ignored"
    queries = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) * 255
    expected = soft_labels(queries.numpy(), bank.keys.numpy(), bank.labels.numpy(), 7, 0.05)
    np.testing.assert_allclose(bank.shares(queries).numpy(), expected, atol=1e-5)


def test_soft_bank_is_limited(train: Source) -> None:
    bank = SoftBank(MeanColor(), dataset(train), SoftRetrieval(bank_patches=40))
    assert 8 * 5 - 1 <= len(bank) <= 8 * 5
    assert bank.nbytes == 2 * 40 * (3 + 4)


def test_draw_rare_agrees_with_a_slow_version() -> None:
    generator = torch.Generator().manual_seed(0)
    held = torch.rand(6, 40, 5, generator=generator) < torch.tensor([0.9, 0.5, 0.2, 0.05, 0.02])
    held[:, :3] = False  # patches without a scored class
    shares = held / held.sum(2, keepdim=True).clamp_min(1)
    indices = np.array([4, 0, 9, 11, 12, 300])
    chosen = draw_rare(shares, indices, 7, seed=3)
    draws = uniform(random_bits(3, Stream.EVALUATION, indices, 40))
    for image in range(6):
        classes = [set(np.flatnonzero(patch).tolist()) for patch in held[image].numpy()]
        assert chosen[image].tolist() == rare_patches(classes, draws[image].tolist(), 7)


def test_soft_bank_prefers_rare_classes(tmp_path: Path) -> None:
    """One of the 16 patches of an image has another class; by a uniform draw, a quarter of the images would keep it."""
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:16, 8:16] = 1
    source = open_dataset(write_pairs(tmp_path / "rare", [mask] * 40))
    bank = SoftBank(MeanColor(), dataset(source, 40), SoftRetrieval(bank_patches=160))
    assert len(bank) == 160
    assert int((bank.labels[:, 1] > 0).sum()) > 30


def test_largest_compares_interpolated_scores() -> None:
    scores = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(0))
    maps = interpolate(scores.transpose(1, 2).reshape(2, 3, 3, 3), (12, 12), mode="bilinear")
    assert (largest(scores, 12) == maps.argmax(1).numpy()).all()


def test_soft_bank_of_one_image(tmp_path: Path) -> None:
    one = open_dataset(write_pairs(tmp_path / "one", [block_mask(0)]))
    assert len(SoftBank(MeanColor(), dataset(one, 1), SoftRetrieval(bank_patches=None))) == 16
