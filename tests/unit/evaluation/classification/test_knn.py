import pytest
import torch

from ijepa.evaluation.classification import knn
from ijepa.evaluation.classification.knn import evaluate_knn, knn_ranks
from ijepa.evaluation.metrics.accuracy import accuracies
from ijepa.evaluation.protocols import KnnProtocol
from tests.helpers.encoders import MeanColor
from tests.helpers.feature_clouds import clouds, color_sets
from tests.reference import classifiers


def knn_accuracy(train_x, train_y, test_x, test_y, **settings):
    """Top-1 accuracy by k."""
    ranks = knn_ranks(train_x, train_y, test_x, test_y, **{"temperature": 0.07, **settings})
    return {k: float((rank == 0).double().mean()) for k, rank in ranks.items()}


def flat(split):
    return split.train_x.flatten(1), split.train_y, split.test_x.flatten(1), split.test_y


@pytest.mark.parametrize("chunks", [(16384, 1024), (97, 13)])
def test_knn_ranks_agree_with_the_reference(monkeypatch, chunks):
    monkeypatch.setattr(knn, "TRAIN_CHUNK", chunks[0])
    monkeypatch.setattr(knn, "TEST_CHUNK", chunks[1])
    split = clouds(n=400, m=150, spread=0.35)
    found = knn_accuracy(*flat(split), neighbors=(1, 7, 50, 200), classes=5)
    expected = {k: classifiers.knn_accuracy(*flat(split), k, 0.07, 5) for k in (1, 7, 50, 200)}
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.3 < expected[50] < 0.99, "neither trivial nor at chance"


def test_knn_ranks_standardizes_by_the_train_set():
    split = clouds(n=300, m=100, spread=0.5)
    scale = torch.logspace(-2, 2, 24)
    stretched = [x.flatten(1).float() * scale + 7 if x.is_floating_point() else x for x in flat(split)]
    train_x, train_y, test_x, test_y = stretched
    mean, deviation = train_x.mean(0), train_x.std(0, correction=0)
    by_hand = (train_x - mean) / deviation, train_y, (test_x - mean) / deviation, test_y
    expected = knn_accuracy(*by_hand, neighbors=(10,), classes=5)
    assert knn_accuracy(*stretched, neighbors=(10,), classes=5, standardize=True) == expected
    assert knn_accuracy(*stretched, neighbors=(10,), classes=5) != expected


def test_knn_ranks_limits_k_to_the_train_set():
    split = clouds(n=30, m=20)
    assert set(knn_ranks(*flat(split), neighbors=(10, 200), temperature=0.07, classes=5)) == {10, 30}


def test_evaluate_knn_notes_a_k_above_the_train_set(tmp_path):
    train, test = color_sets(tmp_path)
    protocol = KnnProtocol(name="toy", crop_fraction=1.0, neighbors=(5, 20, 100), image_size=32)
    result = evaluate_knn({"color": PooledColor()}, train, test, protocol)
    (row,) = result.rows
    assert row["top1"] == 1.0
    assert row["k"] == 20
    assert row["top1_by_k"].keys() == {"5", "20", "60"}
    assert result.notes == ("k = 100 is more than the 60 train images, so all of them vote",)
    assert result.chance == pytest.approx(1 / 3)


def test_knn_ranks_of_shuffled_labels_are_at_chance():
    split = clouds(n=2000, m=2000, classes=4)
    shuffled = split.train_y[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    train_x, _, test_x, test_y = flat(split)
    accuracy = knn_accuracy(train_x, shuffled, test_x, test_y, neighbors=(20,), classes=4)[20]
    assert accuracy == pytest.approx(0.25, abs=0.04)
    assert knn_accuracy(*flat(split), neighbors=(20,), classes=4)[20] > 0.95


@pytest.mark.parametrize("without", ["features", "labels"])
def test_interval_of_noise_contains_chance(without):
    split = clouds(n=2000, m=2000, classes=4)
    train_x, train_y, test_x, test_y = flat(split)
    generator = torch.Generator().manual_seed(3)
    if without == "features":
        train_x, test_x = (torch.randn(x.shape, generator=generator) for x in (train_x, test_x))
    else:
        train_y, test_y = (y[torch.randperm(len(y), generator=generator)] for y in (train_y, test_y))
    settings = {"neighbors": (20,), "temperature": 0.07, "classes": 4}
    low, high = accuracies(knn_ranks(train_x, train_y, test_x, test_y, **settings)[20])["ci"]
    assert low <= 0.25 <= high and high - low < 0.05
    assert accuracies(knn_ranks(*flat(split), **settings)[20])["ci"][0] > 0.9


class PooledColor(MeanColor):
    grid = (4, 4)

    def forward_blocks(self, pixels, last):
        return [self(pixels) - 128.0]


def test_knn_ranks_votes_do_not_overflow_at_a_low_temperature():
    """exp(s / T) overflows float32 at T = .011, and all classes would have the same score."""
    split = clouds(n=400, m=150, spread=0.35)
    nearest = knn_accuracy(*flat(split), neighbors=(1,), classes=5)[1]
    cold = knn_accuracy(*flat(split), neighbors=(150,), temperature=1e-4, classes=5)[150]
    assert cold == pytest.approx(nearest, abs=0.02) and nearest > 0.4
