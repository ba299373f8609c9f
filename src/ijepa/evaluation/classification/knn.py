"""k nearest neighbours over frozen features: for all k in one pass, in memory that does not grow with the train set.

The rule is that of Wu et al. (arXiv 1805.01978, section 3.4), as DINO and its followers use it: features on the unit
sphere, cosine similarity s, a vote of exp(s / .07) for the neighbour's class. The train set goes by in chunks, each
converted to float32 once; what stays is the running nearest of every test image. Votes are added into (B, C) scores
neighbour by neighbour up to each k in turn; a one-hot array of B x k x C, the usual way, would be a hundred times that.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ijepa.data.sources.base import Source
from ijepa.evaluation.classification.compare import Method, Split, compare
from ijepa.evaluation.context import DEFAULT_CONTEXT, EvaluationContext
from ijepa.evaluation.features.extract import Encoder
from ijepa.evaluation.features.standardize import mean_and_std
from ijepa.evaluation.metrics.accuracy import accuracies, ranks_of
from ijepa.evaluation.protocols import KnnProtocol
from ijepa.evaluation.results.schema import EvaluationResult

TRAIN_CHUNK = 16384
TEST_CHUNK = 1024


def evaluate_knn(
    encoders: Mapping[str, Encoder],
    train: Source,
    test: Source,
    protocol: KnnProtocol,
    context: EvaluationContext = DEFAULT_CONTEXT,
) -> EvaluationResult:
    """Evaluate encoders by k nearest neighbors.

    Returns:
        See `classification.compare`; a row has `top1`, `top5` and `ci` at the protocol's k, and `top1_by_k`.

    Raises:
        UserError, RunError: as `classification.compare`.
    """

    def row(split: Split) -> dict[str, Any]:
        ranks = knn_ranks(
            split.train_x[:, -protocol.blocks :].flatten(1),
            split.train_y,
            split.test_x[:, -protocol.blocks :].flatten(1),
            split.test_y,
            neighbours=protocol.neighbours,
            temperature=protocol.temperature,
            classes=split.classes,
            standardise=protocol.standardise,
            device=split.device,
        )
        k = min(protocol.k, len(split.train_y))
        by_k = {str(k): float((rank == 0).double().mean()) for k, rank in ranks.items()}
        return {**accuracies(ranks[k]), "k": k, "top1_by_k": by_k}

    used = min(len(train), protocol.train_images or len(train))
    clipped = [k for k in protocol.neighbours if k > used]
    notes = [f"k = {k} is more than the {used} train images, all of which vote" for k in clipped]
    return compare(Method("knn", row, protocol.blocks, notes=notes), encoders, train, test, protocol, context)


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    neighbours: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    classes: int,
    standardise: bool = False,
) -> dict[int, float]:
    """Return top-1 accuracy by k; see `knn_ranks` for the arguments."""
    ranks = knn_ranks(
        train_x,
        train_y,
        test_x,
        test_y,
        neighbours=neighbours,
        temperature=temperature,
        classes=classes,
        standardise=standardise,
    )
    return {k: float((rank == 0).double().mean()) for k, rank in ranks.items()}


def knn_ranks(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float,
    classes: int,
    standardise: bool = False,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """Return, by k, how many classes win over the true one, for each test image (m,) int64: 0 is right.

    Args:
        train_x, test_x: features (n, D) and (m, D), of any floating type.
        train_y, test_y: classes (n,) and (m,) int64 in [0, classes).
        neighbours: values of k; those above n are read as n.
        temperature: T of the vote exp(s / T).
        classes: C.
        standardise: first bring every dimension to mean 0 and deviation 1 over the train set.
        device: where chunks are compared; features and ranks stay in main memory.
    """
    wanted = sorted({min(k, len(train_x)) for k in neighbours})
    figures = mean_and_std(train_x) if standardise else (torch.zeros(()), torch.ones(()))
    shift, scale = (values.to(device) for values in figures)
    train_y, test_y = train_y.to(device), test_y.to(device)
    chunks = (normalize((part.to(device).float() - shift) / scale, dim=1) for part in train_x.split(TRAIN_CHUNK))
    queries = normalize((test_x.to(device).float() - shift) / scale, dim=1)
    similar, voters = nearest(chunks, train_y, queries, wanted[-1])
    votes = ((similar - similar[:, :1]) / temperature).exp()  # against the nearest's, so that none overflows
    ranks: dict[int, list[Tensor]] = {k: [] for k in wanted}
    for rows in torch.arange(len(queries), device=device).split(TEST_CHUNK):
        scores, voted = votes.new_zeros(len(rows), classes), 0
        for k in wanted:
            scores.scatter_add_(1, voters[rows, voted:k], votes[rows, voted:k])
            ranks[k].append(ranks_of(scores, test_y[rows]).cpu())
            voted = k
    return {k: torch.cat(parts) for k, parts in ranks.items()}


def nearest(chunks: Iterable[Tensor], train_y: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return similarity and class (m, k) of the k most similar train features to each query (m, D), best first.

    `chunks` are the train features in order, (c, D) each; both they and the queries have length 1.
    """
    k = min(k, len(train_y))
    best = queries.new_full((len(queries), k), -torch.inf)
    best_y = train_y.new_zeros(len(queries), k)
    start = 0
    for chunk in chunks:
        labels = train_y[start : start + len(chunk)]
        start += len(chunk)
        for some, value, label in zip(*(x.split(TEST_CHUNK) for x in (queries, best, best_y)), strict=True):
            similar, place = (some @ chunk.T).topk(min(k, len(chunk)), dim=1)
            # Of equals the earlier train image stays: it stands first, and the sort is stable.
            similar, order = torch.cat([value, similar], 1).sort(dim=1, descending=True, stable=True)
            label.copy_(torch.cat([label, labels[place]], 1).gather(1, order[:, :k]))
            value.copy_(similar[:, :k])
    return best, best_y


def planned_memory(train: int, test: int, width: int, *, k: int, classes: int) -> dict[str, int]:
    """Return the bytes that kNN of `test` by `train` images takes at its peak, by what takes them.

    Only the features themselves, in float16, grow with the train set.
    """
    chunk, rows = min(TRAIN_CHUNK, train), min(TEST_CHUNK, test)
    return {
        "features": 2 * (train + test) * width + 8 * (train + test),
        "queries": 3 * 4 * test * width,  # as they are brought to length 1
        "chunk": 4 * 4 * chunk * width,  # the last one lives until the next is there
        "scores": 4 * rows * chunk + 2 * 12 * rows * (chunk + k) // 4,
        "neighbours": 20 * test * k,  # similarity, class, and vote twice
        "votes": 3 * 4 * rows * classes,
    }
