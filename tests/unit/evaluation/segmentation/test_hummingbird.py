"""Soft retrieval and the trained layer: against slow, obvious versions, and what bounds them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from ijepa.data.open import open_source
from ijepa.data.sources.base import Source
from ijepa.evaluation.segmentation.dataset import Annotated, Classes
from ijepa.evaluation.segmentation.hummingbird import SoftBank, class_shares, draw_rare, largest
from ijepa.evaluation.segmentation.linear import loss_of, train_layer
from ijepa.evaluation.segmentation.protocol import LinearHead, SoftRetrieval
from ijepa.utils.random import Stream, random_bits, uniform
from tests.helpers.encoders import MeanColour, block_mask, write_pairs
from tests.reference.segmentation import rare_patches, soft_labels

CLASSES = Classes(4, ("a", "b", "c", "d"), (255,))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Source:
    masks = [block_mask(i) for i in range(8)]
    masks[0][:8, :12] = 255
    return open_source(write_pairs(tmp_path_factory.mktemp("pairs") / "train", masks))


def annotated(source: Source, count: int = 8) -> Annotated:
    return Annotated(source, np.arange(count), "--train", 32, 32)


def test_shares_count_scored_pixels() -> None:
    labels = torch.tensor([[0, 0, 1, 255], [3, 3, 3, 3], [255, 255, 255, 255]])
    assert class_shares(labels, CLASSES)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert class_shares(labels, CLASSES)[1:].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    without = Classes(4, CLASSES.names, (0, 255))
    assert class_shares(labels, without)[0].tolist() == [0, 1, 0, 0]


def test_a_patch_takes_its_neighbours_labels_by_their_cosine(train: Source) -> None:
    bank = SoftBank(MeanColour(), annotated(train), CLASSES, SoftRetrieval(neighbours=7, temperature=0.05))
    assert len(bank) == 8 * 16 - 1, "one patch is ignored altogether"
    queries = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) * 255
    expected = soft_labels(queries.numpy(), bank.keys.numpy(), bank.labels.numpy(), 7, 0.05)
    np.testing.assert_allclose(bank.shares(queries).numpy(), expected, atol=1e-5)


def test_the_bank_is_bounded(train: Source) -> None:
    bank = SoftBank(MeanColour(), annotated(train), CLASSES, SoftRetrieval(bank_patches=40))
    assert 8 * 5 - 1 <= len(bank) <= 8 * 5
    assert bank.nbytes == 2 * 40 * (3 + 4)


def test_patches_are_drawn_by_how_rare_their_classes_are() -> None:
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


def test_a_bounded_bank_holds_more_of_rare_classes(tmp_path: Path) -> None:
    """One of an image's 16 patches is of another class: drawn uniformly, a quarter of the images would keep it."""
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:16, 8:16] = 1
    source = open_source(write_pairs(tmp_path / "rare", [mask] * 40))
    bank = SoftBank(MeanColour(), annotated(source, 40), CLASSES, SoftRetrieval(bank_patches=160))
    assert len(bank) == 160
    assert int((bank.labels[:, 1] > 0).sum()) > 30


def test_scores_are_interpolated_and_then_compared() -> None:
    scores = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(0))
    maps = interpolate(scores.transpose(1, 2).reshape(2, 3, 3, 3), (12, 12), mode="bilinear")
    assert (largest(scores, 12) == maps.argmax(1).numpy()).all()


def test_loss_is_the_mean_over_scored_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(2, 4, 3, generator=generator), torch.randint(3, (2, 8, 8), generator=generator)
    masks[0, :5] = -100
    maps = interpolate(logits.transpose(1, 2).reshape(2, 3, 2, 2), (8, 8), mode="bilinear")
    assert float(loss_of(logits, masks)) == pytest.approx(float(cross_entropy(maps, masks)), rel=1e-5)
    assert float(loss_of(logits, torch.full_like(masks, -100))) == 0


def test_a_layer_never_answers_an_ignored_class(train: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = LinearHead(steps=30, lr=0.05, batch=4)
    barred = Classes(4, CLASSES.names, (2, 255))
    layer = train_layer(MeanColour(), annotated(train), barred, rule, seed=0)
    patches = torch.rand(3, 16, 3, generator=torch.Generator().manual_seed(0)) * 255
    assert 2 not in layer.masks(patches, 32)
    again = train_layer(MeanColour(), annotated(train), barred, rule, seed=0)
    torch.testing.assert_close(layer.state_dict(), again.state_dict(), atol=0, rtol=0)
    monkeypatch.setattr("ijepa.evaluation.segmentation.linear.KEPT", 0)
    in_loop = train_layer(MeanColour(), annotated(train), barred, rule, seed=0)
    # Features in memory are float16.
    torch.testing.assert_close(layer.linear.weight, in_loop.linear.weight, atol=0.02, rtol=0)


def test_a_set_may_be_of_one_image(tmp_path: Path) -> None:
    one = open_source(write_pairs(tmp_path / "one", [block_mask(0)]))
    assert len(SoftBank(MeanColour(), annotated(one, 1), CLASSES, SoftRetrieval(bank_patches=None))) == 16
