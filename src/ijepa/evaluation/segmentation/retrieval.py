"""Segmentation by dense nearest neighbors: a bank of labeled patches. Nothing is trained.

Level 1: the labels of a support set are looked up. Each pixel of a test patch gets the most frequent class at the same
place in the k most similar patches of the bank, so that edges inside patches are kept. This is the evaluation of CAPI
(Darcet et al., arXiv 2502.08769), with two differences: ignored pixels of a neighbor vote for its most frequent class
and not for "ignored", and one search serves all values of k.

Both distances are computed as inner products: cosine of normalized rows, and for L2 the order of |q - x|^2 is that of
|x|^2 / 2 - x.q. The search reads the bank and the queries in chunks and keeps k candidates per query. In addition to
the bank, which has m (4 D + L) bytes for m patches of width D with L pixels, it needs 4 QUERIES * KEYS bytes for scores
and 8 D KEYS for a chunk of keys (together 120 MB for D = 384), 12 k per query, and QUERIES * C * L for the votes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

Distance = Literal["cosine", "l2"]

QUERIES, KEYS = 1024, 16384

BLOCK = 64
"""Number of scores in a block; only the maximum of each block is compared first."""


def search(queries: Tensor, keys: Tensor, k: int, distance: Distance) -> Tensor:
    """Return the numbers (q, k) of the k nearest rows of keys (m, D) for each of queries (q, D), nearest first."""
    k = min(k, len(keys))
    best = queries.new_full((len(queries), k), -torch.inf)
    where = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
    scores = queries.new_empty(min(len(queries), QUERIES) * min(len(keys), KEYS))  # one buffer: new pages take 10 %
    for start in range(0, len(keys), KEYS):
        chunk = keys[start : start + KEYS].to(queries.dtype)  # once per chunk, for all queries
        chunk = normalize(chunk, dim=1) if distance == "cosine" else chunk
        offset = chunk.square().sum(1).div_(-2) if distance == "l2" else None
        for some, value, index in zip(queries.split(QUERIES), best.split(QUERIES), where.split(QUERIES), strict=True):
            # The length of a query does not change the order of its cosines.
            score = scores[: len(some) * len(chunk)].view(len(some), len(chunk))
            if offset is None:
                torch.mm(some, chunk.T, out=score)
            else:
                torch.addmm(offset, some, chunk.T, out=score)
            found, place = highest(score, min(k, len(chunk)))
            found, order = torch.cat([value, found], 1).topk(k, dim=1)
            index.copy_(torch.cat([index, place.add_(start)], 1).gather(1, order))
            value.copy_(found)
    return where


def highest(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and places of the k highest scores of each row of (q, n), as `topk`; equals in any order.

    The k highest are in the k blocks with the highest maxima. To compute the maxima takes one pass at the speed of
    memory; `topk` over all n takes ten times as long.
    """
    blocks = score.shape[1] // BLOCK
    if score.shape[1] % BLOCK or blocks < 4 * k:
        return score.topk(k, dim=1)
    folded = score.unflatten(1, (blocks, BLOCK))  # (q, blocks, BLOCK)
    chosen = folded.amax(2).topk(k, dim=1, sorted=False).indices  # (q, k)
    value, place = folded.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1).topk(k, dim=1)
    return value, chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK


def vote(labels: Tensor, classes: int) -> Tensor:
    """Return the most frequent of k labels, the lowest of equals: (q, k, L) integers -> (q, L) int64, for k < 256."""
    voted = torch.empty(labels.shape[0], labels.shape[2], dtype=torch.long, device=labels.device)
    for some, out in zip(labels.split(QUERIES), voted.split(QUERIES), strict=True):
        counts = torch.zeros(len(some), classes, some.shape[2], dtype=torch.uint8, device=labels.device)
        one = torch.ones((), dtype=torch.uint8, device=labels.device).expand(len(some), 1, some.shape[2])
        for neighbor in some.unbind(1):
            counts.scatter_add_(1, neighbor.long()[:, None], one)
        out.copy_(counts.argmax(1))
    return voted


def patch_labels(masks: Tensor, patch: int) -> Tensor:
    """Divide masks (B, S, S) into patches, row by row: (B, N, patch * patch)."""
    side = masks.shape[-1] // patch
    cut = masks.unflatten(2, (side, patch)).unflatten(1, (side, patch))  # (B, side, patch, side, patch)
    return cut.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def whole_masks(labels: Tensor, patch: int) -> Tensor:
    """Undo `patch_labels`: (B, N, patch * patch) -> (B, S, S)."""
    side = round(labels.shape[1] ** 0.5)
    tiles = labels.unflatten(2, (patch, patch)).unflatten(1, (side, side))
    return tiles.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def bank_labels(labels: Tensor, classes: int, ignore: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return labels (m, L) of a bank without ignored ones, and which patches to keep (m,) bool.

    A patch whose most frequent label is ignored is not kept. In others, ignored pixels get the most frequent class.
    """
    ignored = torch.isin(labels, torch.tensor(ignore, dtype=labels.dtype))
    folded = labels.masked_fill(ignored, classes)
    counts = torch.zeros(len(labels), classes + 1, dtype=torch.int32)
    counts.scatter_add_(1, folded, torch.ones_like(folded, dtype=torch.int32))
    most_frequent = counts.argmax(1)
    kept = most_frequent < classes
    return torch.where(ignored, most_frequent[:, None], labels), kept
