import pytest
import torch

from ijepa.evaluation.segmentation import retrieval as r
from ijepa.evaluation.segmentation.ivf import InvertedIndex, sort_rows_


def clusters(m: int, width: int = 24, count: int = 30, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(count, width, generator=draw)
    return centres[torch.randint(count, (m,), generator=draw)] + torch.randn(m, width, generator=draw)


def indexed(m: int = 1500, **options: int) -> tuple[InvertedIndex, torch.Tensor, torch.Tensor]:
    keys = clusters(m)
    numbers = torch.arange(m)[:, None].clone()
    return InvertedIndex(keys, numbers, **options), keys, numbers[:, 0]


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_all_lists_are_the_exact_search(distance: r.Distance) -> None:
    index, keys, _ = indexed(lists=12)
    queries = clusters(40, seed=1)
    found = index.search(queries, keys, 7, distance, probes=12)
    assert torch.equal(found, r.search(queries, keys, 7, distance))
    assert index.recall(queries, keys, 7, distance, probes=12) == 1


def test_sorting_keeps_rows_and_what_is_beside_them_together() -> None:
    index, keys, numbers = indexed()
    assert torch.equal(keys, clusters(1500)[numbers])
    assert sorted(numbers.tolist()) == list(range(1500))
    assert len(index) == round(1500**0.5) and index.ends[-1] == 1500


def test_a_few_lists_find_most_and_more_find_more() -> None:
    index, keys, _ = indexed()
    queries = clusters(60, seed=0)[:60]
    recalls = [index.recall(queries, keys, 10, "cosine", probes=probes) for probes in (1, 8, len(index))]
    assert recalls[0] < recalls[1] <= recalls[2] == 1
    assert recalls[1] > 0.9, "8 of 39 lists"


def test_lists_with_too_few_rows_repeat_the_last() -> None:
    keys = torch.eye(4).repeat_interleave(3, 0)
    index = InvertedIndex(keys, lists=4)
    found = index.search(torch.eye(4)[:1], keys, 8, "cosine", probes=1)
    assert found.shape == (1, 8)
    assert len(set(found[0].tolist())) <= 12 and (found >= 0).all()
    assert (keys[found[0, :3]] @ torch.eye(4)[0] == 1).all()


def test_float16_banks_and_repeats() -> None:
    first, second = clusters(800).half(), clusters(800).half()
    one, two = InvertedIndex(first, lists=20, seed=3), InvertedIndex(second, lists=20, seed=3)
    assert torch.equal(first, second) and torch.equal(one.centres, two.centres)
    queries = clusters(10, seed=2)
    assert torch.equal(one.search(queries, first, 5, "cosine", 4), two.search(queries, second, 5, "cosine", 4))


@pytest.mark.parametrize("shape", [(50, 3), (50, 40), (50,)])
def test_rows_are_sorted_in_place(shape: tuple[int, ...]) -> None:
    values, order = torch.rand(shape), torch.randperm(50)
    wanted = values[order]
    place = values.data_ptr()
    sort_rows_(values, order)
    assert torch.equal(values, wanted) and values.data_ptr() == place


@pytest.mark.parametrize(("width", "k"), [(64 * 40, 10), (64 * 40, 11), (1000, 3), (64 * 4, 1), (5, 5)])
def test_highest_is_topk(width: int, k: int) -> None:
    score = torch.rand(17, width, generator=torch.Generator().manual_seed(k)) - 0.5
    value, place = r.highest(score, k)
    assert torch.equal(value, score.topk(k, dim=1).values)
    assert torch.equal(score.gather(1, place), value)
