import numpy as np
import pytest
import torch

from ijepa.evaluation.classification.lars import Lars
from tests.reference.classifiers import lars_steps


def test_two_steps_by_hand():
    """|w| = 5; the gradient alone has length 2, with decay 1/2 the sum is (1.5 + .0, 2 + 2) and so on."""
    weight, bias = torch.tensor([3.0, 4.0]).view(2, 1, 1), torch.zeros(1, 1)
    optimizer = Lars([weight, bias], torch.zeros(1, 1), momentum=0.5, trust=0.1)
    gradient = torch.tensor([2.0, 0.0]).view(2, 1, 1)
    optimizer.step([gradient, torch.ones(1, 1)], torch.full((1, 1), 2.0))
    # Scale .1 * 5 / 2 = .25: momentum (.5, 0), weight (3 - 1, 4); the bias is not scaled: -2.
    assert weight.flatten().tolist() == pytest.approx([2, 4])
    assert bias.item() == pytest.approx(-2)
    optimizer.step([gradient, torch.ones(1, 1)], torch.full((1, 1), 1.0))
    # |w| = sqrt(20), scale .1 * sqrt(20) / 2; momentum .5 * .5 + 2 * scale; the bias' 1.5.
    assert weight.flatten().tolist() == pytest.approx([2 - 0.25 - 0.1 * 20**0.5, 4])
    assert bias.item() == pytest.approx(-3.5)


def test_decay_joins_the_gradient_before_it_is_scaled():
    weight = torch.tensor([3.0, 4.0]).view(2, 1, 1)
    optimizer = Lars([weight], torch.full((1, 1), 0.5), trust=0.1)
    optimizer.step([torch.zeros(2, 1, 1)], torch.full((1, 1), 1.0))
    # The update is w / 2, of length 2.5: scale .1 * 5 / 2.5 = .2, so w - .1 w.
    assert weight.flatten().tolist() == pytest.approx([2.7, 3.6])


def test_heads_at_zero_leave_it_and_without_gradient_stay():
    weight = torch.zeros(2, 2, 1)
    gradient = torch.tensor([[[1.0], [0.0]], [[1.0], [0.0]]])
    Lars([weight], torch.zeros(2, 1)).step([gradient], torch.full((2, 1), 0.1))
    assert weight[:, 0].flatten().tolist() == pytest.approx([-0.1, -0.1])
    assert weight[:, 1].flatten().tolist() == [0, 0]


def test_every_head_as_by_itself():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 3, 2)), rng.normal(size=(3, 2))
    gradients = [(rng.normal(size=(4, 3, 2)), rng.normal(size=(3, 2))) for _ in range(5)]
    rates, decays = [0.3, 2.0, 10.0], [0.0, 0.01, 0.5]
    together = [torch.tensor(weight), torch.tensor(bias)]
    optimizer = Lars(together, torch.tensor(decays)[:, None], momentum=0.9)
    for step, pair in enumerate(gradients, start=1):
        optimizer.step([torch.tensor(g) for g in pair], torch.tensor(rates)[:, None] / step)
    for head in range(3):
        own = [(w[:, head], b[head]) for w, b in gradients]
        factors = [rates[head] / step for step in range(1, 6)]
        expected = lars_steps(weight[:, head], bias[head], own, factors, decays[head], 0.9, 0.001)
        np.testing.assert_allclose(together[0][:, head].numpy(), expected[0], rtol=1e-6)
        np.testing.assert_allclose(together[1][head].numpy(), expected[1], rtol=1e-6)


def test_a_decayed_bias_is_not_scaled():
    weight, bias = torch.tensor([3.0, 4.0]).view(2, 1, 1), torch.full((1, 1), 8.0)
    optimizer = Lars([weight, bias], torch.full((1, 1), 0.5), momentum=0.5, trust=0.1, decayed=2)
    for expected in (8 - 4 - 1, 3 - (2.5 + 2.5)):  # the change is 1 + w / 2, and half of the one before
        optimizer.step([torch.ones(2, 1, 1), torch.ones(1, 1)], torch.ones(1, 1))
        assert bias.item() == pytest.approx(expected)
