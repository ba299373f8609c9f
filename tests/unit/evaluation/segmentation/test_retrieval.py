import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa.evaluation.segmentation import retrieval as r
from tests.reference.segmentation import retrieve


def problem(seed: int, keys: int = 90, queries: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    bank, asked = torch.randn(keys, 6, **draw) + 0.5, torch.randn(queries, 6, **draw) * 2
    return asked, bank, torch.randint(0, 4, (keys, 9), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_search_and_vote_agree_with_brute_force(distance: r.Distance, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks do not divide the queries or the bank, and some are smaller than k."""
    monkeypatch.setattr(r, "QUERIES", 16)
    monkeypatch.setattr(r, "KEYS", 20)
    queries, keys, labels = problem(k)
    found = r.vote(labels[r.search(queries, keys, k, distance)], 4)
    expected = retrieve(queries.numpy(), keys.numpy(), labels.numpy(), k, distance)
    np.testing.assert_array_equal(found, expected)


def test_search_for_more_neighbors_than_rows_returns_all_rows() -> None:
    queries, keys, _ = problem(0, keys=5)
    found = r.search(queries, keys, 30, "l2")
    assert (found.sort(1).values == torch.arange(5)).all()


def test_search_returns_the_nearest_first() -> None:
    keys = torch.tensor([[3.0, 0], [1, 0], [2, 0]])
    assert r.search(torch.tensor([[0.0, 0]]), keys, 3, "l2").tolist() == [[1, 2, 0]]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_whole_masks_is_the_inverse_of_patch_labels(batch: int, side: int, patch: int) -> None:
    masks = torch.arange(batch * (side * patch) ** 2).reshape(batch, side * patch, side * patch)
    cut = r.patch_labels(masks, patch)
    assert cut.shape == (batch, side * side, patch * patch)
    assert cut[0, 0].tolist() == masks[0, :patch, :patch].flatten().tolist()
    assert torch.equal(r.whole_masks(cut, patch), masks)


def test_bank_labels_drops_ignored_labels() -> None:
    labels = torch.tensor([[1, 1, 255, 2], [255, 255, 255, 2], [2, 2, 2, 1], [0, 0, 255, 0]])
    known, kept = r.bank_labels(labels, 3, (0, 255))
    assert kept.tolist() == [True, False, True, False]
    assert known[kept].tolist() == [[1, 1, 1, 2], [2, 2, 2, 1]]


@pytest.mark.parametrize(("width", "k"), [(64 * 40, 10), (64 * 40, 11), (1000, 3), (64 * 4, 1), (5, 5)])
def test_highest_agrees_with_topk(width: int, k: int) -> None:
    score = torch.rand(17, width, generator=torch.Generator().manual_seed(k)) - 0.5
    value, place = r.highest(score, k)
    assert torch.equal(value, score.topk(k, dim=1).values)
    assert torch.equal(score.gather(1, place), value)
