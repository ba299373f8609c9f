import numpy as np
import pytest
import torch

from ijepa.evaluation.classification.optimizers import LARS, make_optimizer, parameter_groups, set_rates
from tests.reference.classifiers import lars_steps


def parameter(values, grad) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.tensor(values))
    made.grad = torch.tensor(grad)
    return made


def test_lars_two_steps_by_hand():
    weight, bias = parameter([[3.0, 4.0]], [[2.0, 0.0]]), parameter([0.0], [1.0])
    optimizer = LARS([{"params": [weight, bias], "weight_decay": 0.0, "lr": 2.0}], momentum=0.5, trust=0.1)
    optimizer.step()
    # |w| = 5 and |gradient| = 2: the scale is .1 * 5 / 2 = .25, so the momentum is (.5, 0) and the weight (3 - 1, 4).
    # The bias is not scaled: 0 - 2 * 1.
    assert weight.flatten().tolist() == pytest.approx([2, 4])
    assert bias.item() == pytest.approx(-2)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    # |w| = sqrt(20), so the momentum is .5 * .5 + 2 * (.1 * sqrt(20) / 2). That of the bias is .5 * 1 + 1.
    assert weight.flatten().tolist() == pytest.approx([2 - 0.25 - 0.1 * 20**0.5, 4])
    assert bias.item() == pytest.approx(-3.5)


def test_lars_adds_weight_decay_before_scaling():
    weight = parameter([[3.0, 4.0]], [[0.0, 0.0]])
    LARS([{"params": [weight], "weight_decay": 0.5, "lr": 1.0}], trust=0.1).step()
    # The update is w / 2 with length 2.5, so the scale is .1 * 5 / 2.5 = .2 and the result w - .1 w.
    assert weight.flatten().tolist() == pytest.approx([2.7, 3.6])


def test_lars_does_not_scale_a_decayed_bias():
    bias = parameter([8.0], [1.0])
    optimizer = LARS([{"params": [bias], "weight_decay": 0.5, "lr": 1.0}], momentum=0.5, trust=0.1)
    for expected in (8 - 5, 3 - 2.5 - 2.5):  # the update is 1 + bias / 2, plus half of the update before
        optimizer.step()
        assert bias.item() == pytest.approx(expected)


def test_lars_moves_weights_that_are_zero_only_by_a_gradient():
    moves, stays = parameter([[0.0, 0.0]], [[1.0, 1.0]]), parameter([[0.0, 0.0]], [[0.0, 0.0]])
    LARS([{"params": [moves, stays], "weight_decay": 0.0, "lr": 0.1}]).step()
    assert moves.flatten().tolist() == pytest.approx([-0.1, -0.1])
    assert stays.flatten().tolist() == [0, 0]


def test_lars_against_the_reference():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 3)), rng.normal(size=4)
    gradients = [(rng.normal(size=(4, 3)), rng.normal(size=4)) for _ in range(5)]
    rates = [2.0 / step for step in range(1, 6)]
    matrix, vector = parameter(weight, weight), parameter(bias, bias)
    groups = parameter_groups([(matrix, 1.0, 0.5), (vector, 1.0, 0.0)])
    optimizer = make_optimizer("lars", groups, betas=(0.9, 0.95), momentum=0.9)
    for (by_weight, by_bias), rate in zip(gradients, rates, strict=True):
        matrix.grad, vector.grad = torch.tensor(by_weight), torch.tensor(by_bias)
        set_rates(optimizer, rate)
        optimizer.step()
    expected = lars_steps(weight, bias, gradients, rates, 0.5, 0.9, 0.001)
    np.testing.assert_allclose(matrix.detach().numpy(), expected[0], rtol=1e-6)
    np.testing.assert_allclose(vector.detach().numpy(), expected[1], rtol=1e-6)
