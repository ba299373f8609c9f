"""k nearest neighbors on frozen features: all k in one pass, in memory that does not grow with the train set.

The rule is that of Wu et al. (arXiv 1805.01978, section 3.4), as DINO uses it (Caron et al., arXiv 2104.14294,
`eval_knn.py`): cosine similarity s, and a vote of exp(s / 0.07) for the class of each neighbor. The train set is read
in chunks, each converted to float32 once, and only the nearest neighbors so far of each test image are kept. Votes are
added to scores (B, C) neighbor by neighbor up to each k; the usual one-hot array (B, k, C) would be k times as large.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ijepa.data.sources.base import Source
from ijepa.evaluation.classification.compare import Method, Split, compare
from ijepa.evaluation.context import DEFAULT_CONTEXT, EvaluationContext
from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.features.standardize import mean_and_std
from ijepa.evaluation.metrics.accuracy import accuracies, class_ranks
from ijepa.evaluation.protocols import KnnProtocol
from ijepa.evaluation.results.schema import EvaluationResult

TRAIN_CHUNK = 16384
"""Train images per matrix product."""
TEST_CHUNK = 1024
"""Test images per matrix product."""


def evaluate_knn(
    encoders: Mapping[str, PatchEncoder],
    train: Source,
    test: Source,
    protocol: KnnProtocol,
    context: EvaluationContext = DEFAULT_CONTEXT,
) -> EvaluationResult:
    """Evaluate encoders by k nearest neighbors.

    Returns:
        See `classification.compare`; a row has `top1`, `top5` and `ci` at the k of the protocol, and `top1_by_k`.

    Raises:
        UserError, RunError: as `classification.compare`.
    """

    def row(split: Split) -> dict[str, Any]:
        ranks_by_k = knn_ranks(
            split.train_x[:, -protocol.blocks :].flatten(1),
            split.train_y,
            split.test_x[:, -protocol.blocks :].flatten(1),
            split.test_y,
            neighbors=protocol.neighbors,
            temperature=protocol.temperature,
            classes=split.classes,
            standardize=protocol.standardize,
            device=split.device,
        )
        k = min(protocol.k, len(split.train_y))
        top1_by_k = {str(each): float((ranks == 0).double().mean()) for each, ranks in ranks_by_k.items()}
        return {**accuracies(ranks_by_k[k]), "k": k, "top1_by_k": top1_by_k}

    used = min(len(train), protocol.train_images or len(train))
    clipped = [k for k in protocol.neighbors if k > used]
    notes = [f"k = {k} is larger than the number of train images, {used}, so all of them vote" for k in clipped]
    return compare(Method("knn", row, protocol.blocks, notes=notes), encoders, train, test, protocol, context)


def knn_ranks(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    neighbors: Sequence[int],
    temperature: float,
    classes: int,
    standardize: bool = False,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """Return the ranks (m,) int64 of the true classes of the test images by k; rank 0 is correct.

    Args:
        train_x, test_x: features (n, D) and (m, D) of any floating type.
        train_y, test_y: classes (n,) and (m,) int64 in [0, classes).
        neighbors: values of k; n replaces larger ones.
        temperature: T of the vote exp(s / T).
        classes: C.
        standardize: bring each channel to mean 0 and standard deviation 1 over the train set first.
        device: device of the computation; features and ranks stay in main memory.
    """
    wanted = sorted({min(k, len(train_x)) for k in neighbors})
    statistics = mean_and_std(train_x) if standardize else (torch.zeros(()), torch.ones(()))
    mean, std = (values.to(device) for values in statistics)
    train_y, test_y = train_y.to(device), test_y.to(device)
    chunks = (normalize((part.to(device).float() - mean) / std, dim=1) for part in train_x.split(TRAIN_CHUNK))
    queries = normalize((test_x.to(device).float() - mean) / std, dim=1)
    similarity, voters = nearest(chunks, train_y, queries, wanted[-1])
    # Relative to the vote of the nearest neighbor, because exp(1 / T) overflows float32 at T = 0.01.
    votes = ((similarity - similarity[:, :1]) / temperature).exp()
    ranks: dict[int, list[Tensor]] = {k: [] for k in wanted}
    for rows in torch.arange(len(queries), device=device).split(TEST_CHUNK):
        scores, voted = votes.new_zeros(len(rows), classes), 0
        for k in wanted:
            scores.scatter_add_(1, voters[rows, voted:k], votes[rows, voted:k])
            ranks[k].append(class_ranks(scores, test_y[rows]).cpu())
            voted = k
    return {k: torch.cat(parts) for k, parts in ranks.items()}


def nearest(chunks: Iterable[Tensor], train_y: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return similarity and class (m, k) of the k most similar train features for queries (m, D), best first.

    `chunks` (c, D) are the train features in order. All features have length 1.
    """
    k = min(k, len(train_y))
    best = queries.new_full((len(queries), k), -torch.inf)
    best_y = train_y.new_zeros(len(queries), k)
    start = 0
    for chunk in chunks:
        labels = train_y[start : start + len(chunk)]
        start += len(chunk)
        for query, value, label in zip(*(x.split(TEST_CHUNK) for x in (queries, best, best_y)), strict=True):
            similarity, place = (query @ chunk.T).topk(min(k, len(chunk)), dim=1)
            # Of equal neighbors the earlier train image wins: it comes first, and the sort is stable.
            similarity, order = torch.cat([value, similarity], 1).sort(dim=1, descending=True, stable=True)
            # `value` and `label` are views of `best` and `best_y`.
            label.copy_(torch.cat([label, labels[place]], 1).gather(1, order[:, :k]))
            value.copy_(similarity[:, :k])
    return best, best_y
