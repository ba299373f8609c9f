import numpy as np
import pytest

from ijepa.evaluation.metrics.bootstrap import miou_interval, times_drawn
from ijepa.evaluation.metrics.iou import Confusion


def confusion(n: int, *, right: float, classes: int = 4, seed: int = 0, ignore: tuple[int, ...] = ()) -> Confusion:
    """n images of 4 x 5 pixels, whose share `right` varies from image to image."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (n, 4, 5))
    kept = rng.random(truth.shape) < rng.uniform(2 * right - 1, 1, (n, 1, 1))
    made = Confusion(classes, ignore)
    made.add(truth, np.where(kept, truth, rng.integers(0, classes, truth.shape)))
    return made


def resampled(runs: list[Confusion], weights: np.ndarray) -> float:
    """The slow way: counts of the drawn images, added one by one, and the mean mIoU of the runs."""
    scores = []
    for run in runs:
        sums = sum(times * image.astype(float) for times, image in zip(weights, run.of_images, strict=True))
        iou = []
        for label in run.scored:
            hit, true, predicted = sums[:, label]
            if true + predicted - hit > 0:
                iou.append(hit / (true + predicted - hit))
        scores.append(np.mean(iou) if iou else 0.0)
    return float(np.mean(scores))


@pytest.mark.parametrize("ignore", [(), (0, 255)])
def test_miou_interval_agrees_with_resampled_data_sets(ignore: tuple[int, ...]) -> None:
    runs = [confusion(9, right=0.7, seed=seed, ignore=ignore) for seed in (0, 1)]
    draws = times_drawn(np.arange(200), 9, 5)
    slow = np.quantile([resampled(runs, weights) for weights in draws], [0.025, 0.975])
    np.testing.assert_allclose(miou_interval(runs, seed=5, resamples=200), slow, atol=1e-12)


def test_miou_interval_leaves_out_classes_that_a_resample_lacks() -> None:
    made = Confusion(3)
    made.add(np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int))
    made.add(np.ones((1, 2, 2), int), np.ones((1, 2, 2), int))
    assert miou_interval([made], seed=0) == (1.0, 1.0)


def test_times_drawn_depends_on_the_number_of_the_resample() -> None:
    draws = times_drawn(np.arange(50), 12, 3)
    assert (draws.sum(1) == 12).all() and draws.std() > 0
    np.testing.assert_array_equal(draws[20:30], times_drawn(np.arange(20, 30), 12, 3))


def test_miou_interval_contains_the_mean_and_narrows_with_more_images() -> None:
    few, many = confusion(20, right=0.7), confusion(320, right=0.7)
    widths = []
    for made in (few, many):
        low, high = miou_interval([made], seed=0)
        assert low < made.miou < high
        widths.append(high - low)
    assert 2.5 < widths[0] / widths[1] < 6.5, "16 times as many images: a quarter of the width"


def test_confusion_counts_of_images_add_up() -> None:
    made = confusion(7, right=0.6, ignore=(1,))
    hit, true, predicted = made.of_images.sum(0)
    np.testing.assert_array_equal(hit, np.diagonal(made.counts))
    np.testing.assert_array_equal(true, made.counts.sum(1))
    np.testing.assert_array_equal(predicted, made.counts.sum(0))
