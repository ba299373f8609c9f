import pytest

from ijepa.config.recipe import Lengths, OptimizerSection, ScheduleSection
from ijepa.training.schedules import rates_at

OPTIMIZER = OptimizerSection(lr_encoder=6e-4, lr_predictor=1.5e-3, weight_decay=0.04, weight_decay_end=0.4)


def rates(step, total=1000, warmup=100, cooldown=0, **schedule):
    return rates_at(
        step, Lengths(total=total, warmup=warmup, cooldown=cooldown), OPTIMIZER, ScheduleSection(**schedule)
    )


def test_warmup_is_linear_and_ends_at_the_peak():
    assert rates(0).lr_encoder == pytest.approx(6e-4 / 100)
    assert rates(49).lr_encoder == pytest.approx(3e-4)
    assert rates(99).lr_encoder == pytest.approx(6e-4)
    assert rates(0, warmup_from=0.2).lr_encoder == pytest.approx(6e-4 * (0.2 + 0.8 / 100))


def test_cosine_is_halfway_in_the_middle_and_ends_at_lr_end():
    assert rates(100).lr_predictor == pytest.approx(1.5e-3)
    assert rates(550).lr_predictor == pytest.approx((1.5e-3 + 1e-6) / 2)
    assert rates(1000).lr_predictor == pytest.approx(1e-6)


def test_both_learning_rates_end_at_lr_end():
    for step in (10, 99, 100, 400):
        now = rates(step, lr_end=0.0)
        assert now.lr_predictor / now.lr_encoder == pytest.approx(2.5)


def test_wsd_is_constant_and_then_falls_linearly():
    at = [rates(step, cooldown=200, decay="wsd", lr_end=0.0).lr_encoder for step in (100, 799, 800, 900, 1000)]
    assert at == pytest.approx([6e-4, 6e-4, 6e-4, 3e-4, 0.0])


def test_momentum_is_linear_and_weight_decay_half_a_cosine():
    assert [rates(s).momentum for s in (0, 500, 1000)] == pytest.approx([0.996, 0.998, 1.0])
    assert [rates(s).weight_decay for s in (0, 500, 1000)] == pytest.approx([0.04, 0.22, 0.4])


def test_weight_decay_is_constant_by_default():
    schedule, lengths = ScheduleSection(), Lengths(total=10, warmup=1, cooldown=0)
    assert {rates_at(s, lengths, OptimizerSection(), schedule).weight_decay for s in range(10)} == {0.05}
