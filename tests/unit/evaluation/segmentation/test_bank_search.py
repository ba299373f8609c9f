import pytest
import torch

from ijepa.evaluation.segmentation.bank_search import BankSearch
from ijepa.evaluation.segmentation.protocol import Searched
from ijepa.evaluation.segmentation.retrieval import Distance, search


def clusters(m: int, width: int = 24, count: int = 30, seed: int = 0) -> torch.Tensor:
    """Rows around `count` centers."""
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(count, width, generator=generator)
    return centers[torch.randint(count, (m,), generator=generator)] + torch.randn(m, width, generator=generator)


def approximate(keys: torch.Tensor, lists: int | None, probes: int, seed: int = 0) -> BankSearch:
    return BankSearch(keys, Searched(search="faiss", lists=lists, probes=probes), seed)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_search_of_all_lists_is_exact(distance: Distance) -> None:
    keys, queries = clusters(1500), clusters(40, seed=1)
    bank = approximate(keys, lists=12, probes=12)
    assert torch.equal(bank.nearest(queries, 7, distance), search(queries, keys, 7, distance))
    assert bank.recall() == {"lists": 12, "probes": 12, "recall": 1, "queries": 40}


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_recall_grows_with_the_number_of_probes(distance: Distance) -> None:
    keys, queries = clusters(1500), clusters(60)
    recalls = []
    for probes in (1, 8, 39):
        bank = approximate(keys, None, probes)
        bank.nearest(queries, 10, distance)
        recalls.append(bank.recall()["recall"])
    assert recalls[0] < recalls[1] <= recalls[2] == 1
    assert recalls[1] > 0.9


def test_search_of_too_few_rows_repeats_the_nearest() -> None:
    keys = torch.eye(4).repeat_interleave(3, 0)
    found = approximate(keys, lists=4, probes=1).nearest(torch.eye(4)[:1], 8, "cosine")
    assert found.shape == (1, 8)
    assert sorted(set(found[0].tolist())) == [0, 1, 2]


def test_search_of_float16_rows_repeats_with_the_same_seed() -> None:
    queries = clusters(10, seed=2)
    first, second = (approximate(clusters(800).half(), 20, 4, seed=3).nearest(queries, 5, "cosine") for _ in range(2))
    assert torch.equal(first, second)


def test_exact_search_reports_no_recall() -> None:
    keys, queries = clusters(100), clusters(5, seed=1)
    bank = BankSearch(keys, Searched(), 0)
    assert torch.equal(bank.nearest(queries, 200, "l2"), search(queries, keys, 100, "l2"))
    assert bank.recall() == {}
