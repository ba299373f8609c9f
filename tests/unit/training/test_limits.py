"""Unreadable images stop a run soon if there are too many, and never by chance."""

import math

import numpy as np
import pytest

from ijepa.training.limits import RISK, too_many

IMAGES = 14_146_391


def first_stop(share: float, steps: int, batch: int, seed: int, limit: float = 0.01) -> int | None:
    """Return the first step after which a run stops whose images are unreadable at random, or None."""
    bad = np.random.default_rng(seed).binomial(batch, share, size=steps).cumsum()
    stops = (
        step
        for step, count in enumerate(bad.tolist(), 1)
        if too_many(count, step * batch, IMAGES, limit, shuffled=True)
    )
    return next(stops, None)


@pytest.mark.parametrize("batch", [16, 2048])
@pytest.mark.parametrize("share", [0.005, 0.01])
def test_too_many_is_false_for_a_share_within_the_limit(share, batch):
    """After each of 2,000 steps of 100 runs, also if the share equals the limit."""
    assert [first_stop(share, 2000, batch, seed) for seed in range(100)] == [None] * 100


@pytest.mark.parametrize(("share", "images"), [(0.02, 12_000), (0.05, 1500), (1.0, 16)])
def test_too_many_is_soon_true_for_a_share_above_the_limit(share, images):
    stops = [first_stop(share, 2000, 8, seed) for seed in range(50)]
    assert max(stop or math.inf for stop in stops) * 8 <= images
    assert max(first_stop(share, 10, 2048, seed) or math.inf for seed in range(50)) <= 8


def test_too_many_error_rate_is_below_risk():
    """Dynamic programming over the counts gives the exact probability that a run of 400 images ever stops."""
    limit = 0.05
    alive, stopped = np.array([1.0]), 0.0
    for seen in range(1, 401):
        grown = np.zeros(seen + 1)
        grown[:-1] += alive * (1 - limit)
        grown[1:] += alive * limit
        over = [too_many(bad, seen, IMAGES, limit, shuffled=True) for bad in range(seen + 1)]
        stopped += grown[over].sum()
        alive = np.where(over, 0, grown)
    assert 0 < stopped <= RISK


def test_too_many_is_true_when_the_limit_is_certainly_exceeded():
    """5 of 100 images are unreadable, which is more than 4 %; the fifth image decides."""
    for shuffled in (True, False):
        assert not too_many(5, 90, 100, 0.05, shuffled=shuffled)
        assert not too_many(10, 200, 100, 0.05, shuffled=shuffled)
    assert not too_many(4, 60, 100, 0.04, shuffled=False) and too_many(5, 60, 100, 0.04, shuffled=False)
    assert not too_many(8, 150, 100, 0.04, shuffled=False) and too_many(9, 150, 100, 0.04, shuffled=False)
    assert not too_many(29, 100, 100, 0.29, shuffled=False)


def test_too_many_ignores_evidence_of_unshuffled_data():
    """Unless all images are shuffled, a damaged shard comes at once: half of the first 1,000 images."""
    assert not too_many(500, 1000, 100_000, 0.01, shuffled=False)
    assert too_many(500, 1000, 100_000, 0.01, shuffled=True)


def test_too_many_at_limits_zero_and_one():
    assert too_many(1, 10**6, IMAGES, 0.0, shuffled=True)
    assert not too_many(0, 10**6, IMAGES, 0.0, shuffled=True)
    assert not too_many(10**6, 10**6, IMAGES, 1.0, shuffled=True)


def test_too_many_allows_one_image_unless_the_limit_is_zero():
    """One image of 40 in each of many passes is 2.5 %."""
    for passes in (1, 2, 500):
        assert not too_many(passes, 40 * passes, 40, 0.01, shuffled=True)
        assert too_many(passes + 1, 40 * passes, 40, 0.01, shuffled=True)
        assert too_many(passes, 40 * passes, 40, 0.0, shuffled=True)
