"""Nearest neighbors in a bank of patches: exact, or approximate by an inverted file index of faiss.

The index divides the bank into lists by k-means; a query is compared only with the rows of the `probes` lists whose
centers are nearest. Neighbors in other lists are missed, so that results state the recall. The index holds a float32
copy of the bank. faiss is the extra `faiss`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ijepa.evaluation.features.sampling import choose
from ijepa.evaluation.segmentation.protocol import Searched
from ijepa.evaluation.segmentation.retrieval import Distance, search

_ITERATIONS = 10
"""Iterations of k-means; more of them change the recall in the third digit only."""
_SAMPLE = 64
"""Rows per list from which k-means computes the centers."""
_ADDED = 65536
"""Rows that are added at once, which bounds the memory of their copies."""
_RECALL_QUERIES = 784


class BankSearch:
    """Finds the nearest rows of a bank.

    Args:
        keys: the rows (m, D), float16 or float32. They must not change afterwards.
        rule: method of the search.
        seed: of k-means.
    """

    def __init__(self, keys: Tensor, rule: Searched, seed: int) -> None:
        self.keys, self.rule, self.seed = keys, rule, seed
        self._indexes: dict[Distance, Any] = {}
        self._recall: dict[str, float | int] | None = None

    def nearest(self, queries: Tensor, k: int, distance: Distance) -> Tensor:
        """Return the numbers (q, k) of the k nearest rows for queries (q, D) float32, nearest first.

        k is at most the number of rows. If the lists that are searched hold fewer rows, the nearest one is repeated.
        """
        k = min(k, len(self.keys))
        if self.rule.search == "exact":
            return search(queries, self.keys, k, distance)
        found = torch.from_numpy(self.index(distance).search(_prepared(queries, distance), k)[1])
        found = torch.where(found < 0, found[:, :1], found).clamp_(min=0)
        if self._recall is None:
            asked = queries[:_RECALL_QUERIES]
            exact = search(asked, self.keys, k, distance)
            recall = float((exact[:, :, None] == found[: len(asked), None, :]).any(2).double().mean())
            lists = self.index(distance).nlist
            self._recall = {"lists": lists, "probes": self.rule.probes, "recall": recall, "queries": len(asked)}
        return found

    def recall(self) -> dict[str, float | int]:
        """Return the share of the exact neighbors that the first search found, and its settings; empty if exact."""
        return self._recall or {}

    def index(self, distance: Distance) -> Any:
        """Return the index for a distance, which is built at its first use."""
        import faiss

        if distance not in self._indexes:
            metric = faiss.METRIC_INNER_PRODUCT if distance == "cosine" else faiss.METRIC_L2
            width, lists = self.keys.shape[1], self.rule.lists or max(1, round(len(self.keys) ** 0.5))
            lists = min(lists, len(self.keys))
            index = faiss.IndexIVFFlat(faiss.IndexFlat(width, metric), width, lists, metric)
            # Spherical k-means for cosine: centers have length 1 too.
            index.cp.seed, index.cp.niter, index.cp.spherical = self.seed % 2**31, _ITERATIONS, distance == "cosine"
            index.cp.min_points_per_centroid = 1  # no warnings about small banks
            sample = torch.from_numpy(choose(len(self.keys), min(len(self.keys), _SAMPLE * lists), self.seed))
            index.train(_prepared(self.keys[sample], distance))
            for rows in self.keys.split(_ADDED):
                index.add(_prepared(rows, distance))
            index.nprobe = min(self.rule.probes, lists)
            self._indexes[distance] = index
        return self._indexes[distance]


def _prepared(rows: Tensor, distance: Distance) -> Any:
    """Return rows as faiss reads them: float32, and of length 1 for cosine."""
    return (normalize(rows.float(), dim=1) if distance == "cosine" else rows.float()).contiguous().numpy()
