import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ijepa.evaluation.metrics.iou import Confusion


def confused(truth: np.ndarray, prediction: np.ndarray, classes: int, ignore: tuple[int, ...] = ()) -> Confusion:
    confusion = Confusion(classes, ignore)
    for true, predicted in zip(truth, prediction, strict=True):
        confusion.add(true, predicted)
    return confusion


def images(seed: int, classes: int, present: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, present, (3, 12, 10))
    wrong = rng.random(truth.shape) < 0.3
    return truth, np.where(wrong, rng.integers(0, present, truth.shape), truth)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(0, 3))
def test_confusion_agrees_with_torchmetrics_and_sklearn(seed: int, present: int, absent: int) -> None:
    truth, prediction = images(seed, present + absent, present)
    confusion = confused(truth, prediction, present + absent)
    tensors = torch.from_numpy(prediction), torch.from_numpy(truth)
    theirs = MulticlassJaccardIndex(present + absent, average=None)(*tensors).double().numpy()
    there = np.union1d(truth, prediction)
    sklearn = jaccard_score(truth.ravel(), prediction.ravel(), average="macro")
    assert confusion.miou == pytest.approx(sklearn, abs=1e-9)
    np.testing.assert_allclose(np.nan_to_num(confusion.iou), theirs, atol=1e-7)  # theirs is float32
    assert confusion.miou == pytest.approx(theirs[there].mean(), abs=1e-7)
    assert confusion.miou_absent_zero == pytest.approx(theirs.sum() / (present + absent), abs=1e-7)
    accuracy = MulticlassAccuracy(present + absent, average="micro")(*tensors)
    assert confusion.pixel_accuracy == pytest.approx(float(accuracy), abs=1e-6)


def test_confusion_counts_agree_with_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    truth, prediction = images(5, 7, 6)
    truth[0, :4] = 255
    theirs = multiclass_confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(truth), 7, ignore_index=255)
    assert (confused(truth, prediction, 7, (255,)).counts == theirs.numpy()).all()


@pytest.mark.parametrize("seed", range(4))
def test_miou_agrees_with_counts_of_torchmetrics(seed: int) -> None:
    """The counts of torchmetrics are exact; its own IoU is float32."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    truth, prediction = images(seed, 9, 7)
    truth[seed % 3, :2] = 255
    given = torch.from_numpy(prediction), torch.from_numpy(truth)
    counts = multiclass_confusion_matrix(*given, 9, ignore_index=255).double()
    hit, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    confusion = confused(truth, prediction, 9, (255,))
    assert confusion.miou == pytest.approx(float((hit[union > 0] / union[union > 0]).mean()), abs=1e-9)
    assert confusion.miou_absent_zero == pytest.approx(float((hit / union.clamp_min(1)).mean()), abs=1e-9)
    assert confusion.pixel_accuracy == pytest.approx(float(hit.sum() / counts.sum()), abs=1e-9)


def test_miou_with_and_without_an_absent_class() -> None:
    truth = np.arange(20).reshape(1, 4, 5)
    confusion = confused(truth, truth, 21)
    assert confusion.miou == 1
    assert confusion.miou_absent_zero == pytest.approx(20 / 21)
    assert np.isnan(confusion.iou[20])


def test_iou_of_a_class_that_is_only_predicted_is_zero() -> None:
    confusion = confused(np.zeros((1, 1, 4), int), np.array([[[0, 0, 0, 2]]]), 3)
    np.testing.assert_array_equal(confusion.iou, [0.75, np.nan, 0])
    assert confusion.miou == 0.375


def test_confusion_leaves_out_ignored_labels() -> None:
    """As ADE20K: 0 is no class, 255 is void."""
    truth = np.array([[[0, 0, 255, 1, 2, 2]]])
    confusion = confused(truth, np.array([[[1, 2, 1, 1, 2, 1]]]), 3, (0, 255))
    np.testing.assert_array_equal(confusion.iou, [np.nan, 0.5, 0.5])
    assert confusion.miou == confusion.miou_absent_zero == 0.5
    assert confusion.pixel_accuracy == pytest.approx(2 / 3)


def test_miou_is_over_the_data_set_and_not_a_mean_over_images() -> None:
    truth = np.array([[[0, 0, 0, 0]], [[0, 1, 1, 1]]])
    prediction = np.array([[[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    assert confused(truth, prediction, 2).miou == pytest.approx((4 / 5 + 3 / 4) / 2)


def test_miou_constant_is_that_of_the_most_frequent_class() -> None:
    truth = np.array([[[0, 2, 2, 2, 3, 255]]])
    chance = confused(truth, np.random.default_rng(0).integers(0, 5, truth.shape), 5, (255,)).miou_constant
    assert chance == pytest.approx(confused(truth, np.full_like(truth, 2), 5, (255,)).miou) == pytest.approx(0.6 / 3)
    assert all(confused(truth, np.full_like(truth, other), 5, (255,)).miou < chance for other in (0, 1, 3, 4))


def test_miou_without_pixels_is_zero() -> None:
    assert Confusion(3).miou == Confusion(3).miou_constant == 0
    assert Confusion(3).pixel_accuracy == 0
