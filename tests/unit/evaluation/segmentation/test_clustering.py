from functools import partial

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from ijepa.evaluation.segmentation import clustering as c
from ijepa.evaluation.segmentation.dataset import Classes
from ijepa.utils.errors import UserError
from tests.reference.segmentation import best_assignment, lloyd


def iou_sum(counts: np.ndarray, match: np.ndarray) -> float:
    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    iou = counts / np.maximum(union, 1)
    return float(sum(iou[row, column] for column, row in enumerate(match)))


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_hungarian_agrees_with_all_permutations(classes: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 50, (classes, classes))
    match = c.hungarian(counts)
    assert sorted(match) == list(range(classes))
    assert iou_sum(counts, match) == pytest.approx(best_assignment(counts), abs=1e-12)


def test_hungarian_finds_a_permutation() -> None:
    counts = np.zeros((4, 4), int)
    counts[[2, 0, 3, 1], range(4)] = 10
    np.testing.assert_array_equal(c.hungarian(counts), [2, 0, 3, 1])


def test_by_precision_returns_the_most_frequent_class() -> None:
    np.testing.assert_array_equal(c.by_precision(np.array([[5, 0, 2], [1, 9, 2]])), [0, 1, 0])


def test_kmeans_finds_separated_clusters_and_repeats() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 600)
    points = (rng.normal(0, 30, (6, 8))[truth] + rng.normal(0, 1, (600, 8))).astype(np.float32)
    found = c.kmeans(points, 6, restarts=5, iterations=50, state=1)
    again = c.kmeans(points, 6, restarts=5, iterations=50, state=1)
    np.testing.assert_array_equal(found, again)
    assert len(set(zip(truth, found, strict=True))) == 6


def test_kmeans_agrees_with_lloyd_from_the_same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clusters overlap, so that there are many iterations and a different start has a different result."""
    rng = np.random.default_rng(3)
    points = (rng.normal(0, 1, (6, 4))[rng.integers(0, 6, 240)] + rng.normal(0, 0.6, (240, 4))).astype(np.float32)
    ends = []
    for draw in (0, 1):
        start = points[np.random.default_rng(draw).choice(240, 6, replace=False)]
        monkeypatch.setattr("sklearn.cluster.KMeans", partial(KMeans, init=start, tol=0))
        found = c.kmeans(points, 6, restarts=1, iterations=300, state=0)
        expected, inertia = lloyd(points, start, 300)
        centers = np.array([points[found == number].mean(0, dtype=np.float64) for number in range(6)])
        assert ((points - centers[found]) ** 2).sum() == pytest.approx(inertia, rel=1e-4)
        assert (found == expected).mean() > 0.99
        ends.append(inertia)
    assert ends[0] != pytest.approx(ends[1], rel=1e-3)


def test_reduce_features_standardizes_in_place() -> None:
    features = torch.randn(20, 25, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    components = c.reduce_features(features, 3)
    assert components.shape == (500, 3)
    flat = features.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(flat.std(0), 1, rtol=1e-3)


def test_principal_agrees_with_singular_values() -> None:
    features = torch.randn(300, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 11)
    features = features - features.mean(0)
    projected = c.principal(features, 4)
    values = torch.linalg.svdvals(features)[:4]
    torch.testing.assert_close(projected.norm(dim=0), values, rtol=1e-4, atol=1e-4)
    products = projected.T @ projected
    assert float((products - products.diagonal().diag()).abs().max()) < 1e-3 * float(products.max())
    assert c.principal(features, 50).shape == (300, 10)


def test_assign_classes_leaves_out_ignored_classes() -> None:
    """Class 0 has the most pixels, but it is ignored."""
    assigned = np.array([[[0, 1], [1, 1]]])
    masks = np.array([[[1, 0], [0, 2]]])
    classes = c.assign_classes(assigned, masks, Classes(3, ("a", "b", "c"), (0,)), c.hungarian)
    np.testing.assert_array_equal(classes, [[[1, 2], [2, 2]]])


@pytest.mark.parametrize("module", ["sklearn", "scipy", "threadpoolctl"])
def test_require_clustering_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ijepa.utils.extras.find_spec", lambda name: None if name == module else object())
    with pytest.raises(UserError) as err:
        c.require_clustering("protocol kmeans")
    assert err.value.where == "protocol kmeans" and "[evaluation]" in err.value.hint
