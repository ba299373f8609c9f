"""Slow, obvious versions of what segmentation computes: one patch, one permutation, one pixel at a time."""

from collections import Counter
from itertools import permutations

import numpy as np


def retrieve(queries: np.ndarray, keys: np.ndarray, labels: np.ndarray, k: int, distance: str) -> np.ndarray:
    """Return the most frequent label of the k nearest keys at each pixel of each query, the lowest of equals."""
    predicted = np.empty((len(queries), labels.shape[1]), dtype=np.int64)
    for i, query in enumerate(queries):
        if distance == "l2":
            away = [np.linalg.norm(query - key) for key in keys]
        else:
            away = [1 - query @ key / (np.linalg.norm(query) * np.linalg.norm(key)) for key in keys]
        near = np.argsort(away, kind="stable")[:k]
        for pixel in range(labels.shape[1]):
            counted = Counter(int(labels[j, pixel]) for j in near)
            most = max(counted.values())
            predicted[i, pixel] = min(label for label, count in counted.items() if count == most)
    return predicted


def best_assignment(counts: np.ndarray) -> float:
    """Return the largest sum of IoU of all one-to-one matches of clusters (columns) to classes (rows)."""
    iou = np.zeros(counts.shape)
    for row, column in np.ndindex(*counts.shape):
        union = counts[row].sum() + counts[:, column].sum() - counts[row, column]
        iou[row, column] = counts[row, column] / union if union else 0
    return max(
        sum(iou[row, column] for column, row in enumerate(chosen)) for chosen in permutations(range(len(counts)))
    )


def lloyd(points: np.ndarray, centers: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
    """Return the nearest center of each point and the sum of squared distances, after iterations of k-means."""
    centers = centers.astype(np.float64)
    for _ in range(iterations):
        nearest = np.array([np.argmin([((point - center) ** 2).sum() for center in centers]) for point in points])
        moved = np.array([points[nearest == number].mean(0) for number in range(len(centers))])
        if (moved == centers).all():
            break
        centers = moved
    return nearest, float(((points - centers[nearest]) ** 2).sum())


def position_r2(features: np.ndarray) -> float:
    """Return one minus the share of the variance that is left after the mean of each position is subtracted."""
    left = features - features.mean(0, keepdims=True)
    whole = features - features.mean((0, 1), keepdims=True)
    return float(1 - (left**2).sum() / (whole**2).sum())


def soft_labels(queries, keys, labels, k, temperature):
    """Return the mean of the labels of the k nearest keys of each query, weighted by softmax(cosine / temperature)."""
    found = []
    for query in np.asarray(queries, dtype=np.float64):
        cosine = [float(key @ query / np.linalg.norm(key) / np.linalg.norm(query)) for key in keys.astype(np.float64)]
        near = sorted(range(len(cosine)), key=lambda i: -cosine[i])[:k]
        weights = [np.exp((cosine[i] - cosine[near[0]]) / temperature) for i in near]
        found.append(sum(w * labels[i].astype(np.float64) for w, i in zip(weights, near, strict=True)) / sum(weights))
    return np.array(found)


def rare_patches(classes: list[set[int]], uniforms: list[float], count: int) -> list[int]:
    """Return the selected patches of an image: those with the lowest class frequency times a random number."""
    holding = Counter(label for found in classes for label in found)
    scores = [
        u * sum(holding[label] for label in found) if found else float("inf")
        for found, u in zip(classes, uniforms, strict=True)
    ]
    return sorted(sorted(range(len(classes)), key=lambda patch: scores[patch])[:count])
