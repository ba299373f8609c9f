import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ijepa.data.order import sample_indices
from ijepa.evaluation.linear_probe import EPS, probe, train_heads
from ijepa.evaluation.protocol import LinearProtocol
from tests.evaluation.sets import clouds
from tests.reference import classifiers


def protocol(**fields):
    defaults = {"name": "toy", "blocks": (1,), "lrs": (3e-3,), "weight_decays": (0.0,), "batch": 64, "epochs": 20}
    return LinearProtocol(**{**defaults, **fields})


def test_heads_together_as_each_by_hand():
    split = clouds(n=90, m=10, width=6, classes=3)
    x, y = split.train_x[:, 0], split.train_y
    rule = protocol(batch=32, steps=25, epochs=99, warmup=0.2, standardise=False)
    grid = ((1e-3, 0.0), (5e-2, 0.3))
    heads = train_heads(x, y, 3, grid, rule, seed=4)
    order = sample_indices(4, np.arange(25 * 32), 90).reshape(25, 32)
    factors = [min(step / 5, (1 + np.cos(np.pi * (step - 6) / 20)) / 2 if step > 5 else 1) for step in range(1, 26)]
    for head, (lr, decay) in enumerate(grid):
        rates = [lr * 32 / 256 * factor for factor in factors]
        weight, bias = classifiers.adamw_head(x.double().numpy(), y.numpy(), 3, order, rates, decay, rule.betas, EPS)
        np.testing.assert_allclose(heads.weight[:, head].T.numpy(), weight, atol=2e-5)
        np.testing.assert_allclose(heads.bias[head].numpy(), bias, atol=2e-5)


def test_agrees_with_logistic_regression():
    split = clouds(n=4000, m=4000, width=16, spread=0.5)
    rule = protocol(batch=500, epochs=60, lrs=(3e-3, 3e-2))
    found = probe(split, rule, seed=0)
    scaler = StandardScaler().fit(split.train_x.flatten(1).float())
    other = LogisticRegression(C=1e4, max_iter=1000)
    other.fit(scaler.transform(split.train_x.flatten(1).float()), split.train_y)
    expected = other.score(scaler.transform(split.test_x.flatten(1).float()), split.test_y)
    assert 0.5 < expected < 0.97
    assert found["top1"] == pytest.approx(expected, abs=0.003)
    low, high = found["ci"]
    assert low < found["top1"] < high
    assert found["top5"] == 1.0


def test_chooses_on_held_out_images_alone():
    """Test labels that are all wrong change the reported accuracy, never the chosen head."""
    split = clouds(n=600, m=200, blocks=4, spread=0.2)
    rule = protocol(blocks=(1, 4), lrs=(1e-5, 1e-2), weight_decays=(0.0, 0.1))
    row = probe(split, rule, seed=0)
    wrong = probe(
        type(split)(split.train_x, split.train_y, split.test_x, (split.test_y + 1) % 5, split.classes), rule, seed=0
    )
    assert row["head"] == wrong["head"]
    assert row["held_out"] == wrong["held_out"]
    assert row["top1"] > wrong["top1"]
    assert row["head"]["blocks"] == 4, "four blocks hold four times as much here"


def test_shuffled_labels_and_noise_are_at_chance():
    split = clouds(n=2000, m=2000, classes=4)
    shuffle = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    shuffled = type(split)(split.train_x, split.train_y[shuffle], split.test_x, split.test_y, 4)
    noise = torch.randn(4000, 1, 24, generator=torch.Generator().manual_seed(2))
    random = type(split)(noise[:2000], split.train_y, noise[2000:], split.test_y, 4)
    for without in (shuffled, random):
        assert probe(without, protocol(), seed=0)["top1"] == pytest.approx(0.25, abs=0.04)
    assert probe(split, protocol(), seed=0)["top1"] > 0.95


def test_seed_decides():
    split = clouds(n=500, m=300, spread=0.25)
    assert probe(split, protocol(), seed=1) == probe(split, protocol(), seed=1)
    assert probe(split, protocol(), seed=1) != probe(split, protocol(), seed=2)
