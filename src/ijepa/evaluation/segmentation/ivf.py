"""An inverted index over a bank of patches: a query looks through a few lists of it instead of the whole.

The bank is cut into lists by direction (k-means on the sphere over a sample), its rows are sorted by list where they
lie, and a query is compared with the rows of the `probes` lists whose centres are nearest. With about sqrt(m) lists a
query meets m * probes / lists of m rows, and queries of one image, which resemble each other, share most of their
lists. What is missed is missed silently, so `recall` against the exact search belongs into every result made by it.

Beside the bank the index takes 12 bytes a row (its length, and while it is built its list and place) and 4 D a list;
sorting takes SORTED columns of the bank at a time, a search 12 k probes bytes a query of QUERIES at a time.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ijepa.evaluation.features.sampling import choose
from ijepa.evaluation.segmentation.retrieval import QUERIES, Distance, highest, search

ITERATIONS = 10
"""Of k-means; more change recall in the third digit."""

SAMPLE = 64
"""Rows a list that k-means sees."""

SORTED = 16

_ROWS = 65536


class InvertedIndex:
    """Lists of the rows of a bank.

    Args:
        keys: the bank (m, D); its rows are sorted by list in place.
        beside: what belongs to the rows, (m, ...) each, is sorted in the same way.
        lists: how many; about sqrt(m) if None.
        seed: chooses the sample of k-means.

    Attributes:
        centres: (lists, D), of length 1.
    """

    def __init__(self, keys: Tensor, *beside: Tensor, lists: int | None = None, seed: int = 0) -> None:
        count = min(len(keys), lists or max(1, round(len(keys) ** 0.5)))
        sample = keys[torch.from_numpy(choose(len(keys), SAMPLE * count, seed))].float()
        self.centres = directions(normalize(sample, dim=1), count, seed)
        list_of = torch.cat([search(rows.float(), self.centres, 1, "cosine")[:, 0] for rows in keys.split(_ROWS)])
        order = list_of.argsort(stable=True)
        for values in (keys, *beside):
            sort_rows_(values, order)
        self.ends = list_of.bincount(minlength=count).cumsum(0).tolist()
        self.square = torch.cat([rows.float().square().sum(1) for rows in keys.split(_ROWS)])

    def __len__(self) -> int:
        return len(self.centres)

    def search(self, queries: Tensor, keys: Tensor, k: int, distance: Distance, probes: int) -> Tensor:
        """Return the numbers of the k nearest rows in the lists that are looked through: (q, k), nearest first.

        A query whose lists hold fewer than k rows has the last of those repeated.
        """
        return torch.cat([self._search(some, keys, k, distance, probes) for some in queries.split(QUERIES)])

    def recall(self, queries: Tensor, keys: Tensor, k: int, distance: Distance, probes: int) -> float:
        """Return the share of the k nearest rows of queries (q, D) that `search` finds."""
        found, exact = self.search(queries, keys, k, distance, probes), search(queries, keys, k, distance)
        return float((exact[:, :, None] == found[:, None, :]).any(2).double().mean())

    def _search(self, queries: Tensor, keys: Tensor, k: int, distance: Distance, probes: int) -> Tensor:
        k, probes = min(k, len(keys)), min(probes, len(self))
        probed = search(queries, self.centres, probes, "cosine").flatten()
        order = probed.argsort(stable=True)  # all queries of a list together
        value = queries.new_full((len(probed), k), -torch.inf)
        where = torch.zeros(len(probed), k, dtype=torch.long)
        lists, counts = probed[order].unique_consecutive(return_counts=True)
        for number, pairs in zip(lists.tolist(), order.split(counts.tolist()), strict=True):
            first, end = self.ends[number - 1] if number else 0, self.ends[number]
            if first == end:
                continue
            score = queries[pairs // probes] @ keys[first:end].to(queries.dtype).T
            square = self.square[first:end]
            score = score.mul_(square.clamp_min(1e-24).rsqrt()) if distance == "cosine" else score.sub_(square / 2)
            found, place = highest(score, min(k, end - first))
            value[pairs, : found.shape[1]] = found
            where[pairs, : found.shape[1]] = place + first
        value, where = value.view(len(queries), -1), where.view(len(queries), -1)
        best, order = value.topk(k, dim=1)
        found = where.gather(1, order)
        last = (best > -torch.inf).sum(1, keepdim=True) - 1
        return found.gather(1, torch.minimum(torch.arange(k).expand_as(found), last.clamp_min(0)))


def directions(rows: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` centres of length 1 by k-means on the sphere of rows (n, D) of length 1: (count, D)."""
    centres = rows[torch.from_numpy(choose(len(rows), count, seed + 1))].clone()
    for _ in range(ITERATIONS):
        nearest = search(rows, centres, 1, "cosine")[:, 0]
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        there = nearest.bincount(minlength=len(centres)) > 0
        centres[there] = normalize(sums[there], dim=1)  # one that lost all its rows stays where it was
    return centres


def sort_rows_(values: Tensor, order: Tensor) -> None:
    """Bring the rows of (m, ...) into `order` (m,), in place, a few columns at a time."""
    for columns in values.view(len(values), -1).split(SORTED, dim=1):
        columns.copy_(columns[order])
