import numpy as np
import pytest
import torch
from scipy.stats import binom

from ijepa.evaluation.metrics.accuracy import accuracies, class_ranks, interval


@pytest.mark.parametrize(("right", "total"), [(1, 2), (3, 10), (137, 200), (4000, 50000)])
def test_interval_agrees_with_the_binomial_distribution(right, total):
    low, high = interval(right, total)
    assert (low * total, high * total) == pytest.approx(binom.ppf([0.025, 0.975], total, right / total))


def test_interval_agrees_with_resampling():
    rng = np.random.default_rng(0)
    answers = np.arange(300) < 210
    means = answers[rng.integers(0, 300, (20000, 300))].mean(1)
    assert interval(210, 300) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.0034)


@pytest.mark.parametrize(("right", "end"), [(0, 0.0), (7, 1.0)])
def test_interval_of_no_and_of_all_correct(right, end):
    assert interval(right, 7) == (end, end)


def test_class_ranks_break_ties_like_a_stable_sort():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    assert class_ranks(scores, torch.tensor([0, 0, 1, 2])).tolist() == [2, 0, 1, 2]
    found = accuracies(torch.tensor([0, 0, 4, 5]))
    assert (found["top1"], found["top5"]) == (0.5, 0.75)
