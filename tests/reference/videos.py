"""Slow, obvious versions of what is measured in videos: one pixel, one patch at a time."""

import math

import numpy as np


def contour_f(predicted: np.ndarray, truth: np.ndarray, tolerance: float) -> float:
    """Return F of the contours of two masks, by the distances between all pairs of contour pixels."""

    def points(mask: np.ndarray) -> list[tuple[int, int]]:
        found = []
        for y, x in np.ndindex(*mask.shape):
            below, right = min(y + 1, mask.shape[0] - 1), min(x + 1, mask.shape[1] - 1)
            if any(mask[y, x] != mask[there] for there in ((below, x), (y, right), (below, right))):
                found.append((y, x))
        return found

    radius = math.ceil(tolerance * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    ours, theirs = points(predicted), points(truth)
    if not ours and not theirs:
        return 1.0
    if not ours or not theirs:
        return 0.0

    def near(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        return float(np.mean([any(math.dist(a, b) <= radius for b in others) for a in some]))

    precision, recall = near(ours, theirs), near(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def take(queries, frames, labels, grid, neighbors, radius, temperature):
    """Return labels (N, C) from the most similar patches nearby; `frames` and `labels` have an entry for each frame."""
    rows, columns = grid
    out = []
    for place, query in enumerate(queries):
        y, x = divmod(place, columns)
        candidates = []
        for features, known in zip(frames, labels, strict=True):
            for other in range(rows * columns):
                v, u = divmod(other, columns)
                if abs(v - y) <= radius and abs(u - x) <= radius:
                    candidates.append((math.exp(float(features[other] @ query) / temperature), known[other]))
        best = sorted(candidates, key=lambda pair: -pair[0])[:neighbors]
        out.append(sum(weight * label for weight, label in best) / sum(weight for weight, _ in best))
    return np.array(out)
