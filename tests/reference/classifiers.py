"""k nearest neighbors, one AdamW head and LARS, number by number and in float64: slow and obvious."""

import math

import numpy as np


def knn_accuracy(train_x, train_y, test_x, test_y, k, temperature, classes):
    train = np.asarray(train_x, dtype=np.float64)
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    right = 0
    for x, y in zip(np.asarray(test_x, dtype=np.float64), test_y, strict=True):
        similar = train @ (x / np.linalg.norm(x))
        scores = [0.0] * classes
        for neighbor in np.argsort(-similar, kind="stable")[:k]:
            scores[int(train_y[neighbor])] += math.exp(similar[neighbor] / temperature)
        right += int(np.argmax(scores)) == int(y)
    return right / len(test_y)


def adamw_head(x, y, classes, batches, rates, weight_decay, betas, eps):
    """Return weight (C, F) and bias (C,) of softmax regression after a step on each of `batches` (sample numbers)."""
    weight, bias = np.zeros((classes, x.shape[1])), np.zeros(classes)
    moments = [np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(bias), np.zeros_like(bias)]
    for step, (chosen, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        grad_w, grad_b = np.zeros_like(weight), np.zeros_like(bias)
        for sample in chosen:
            logits = weight @ x[sample] + bias
            share = np.exp(logits - logits.max())
            share /= share.sum()
            share[y[sample]] -= 1
            grad_w += np.outer(share, x[sample]) / len(chosen)
            grad_b += share / len(chosen)
        weight *= 1 - rate * weight_decay
        for values, grad, first in ((weight, grad_w, 0), (bias, grad_b, 2)):
            moments[first] = betas[0] * moments[first] + (1 - betas[0]) * grad
            moments[first + 1] = betas[1] * moments[first + 1] + (1 - betas[1]) * grad**2
            mean = moments[first] / (1 - betas[0] ** step)
            values -= rate * mean / (np.sqrt(moments[first + 1] / (1 - betas[1] ** step)) + eps)
    return weight, bias


def lars_steps(weight, bias, gradients, rates, weight_decay, momentum, trust):
    """Return weight and bias after a step on each of the (weight gradient, bias gradient) pairs."""
    weight, bias = [list(map(float, row)) for row in weight], list(map(float, bias))
    momentum_w, momentum_b = [[0.0] * len(row) for row in weight], [0.0] * len(bias)
    for (grad_w, grad_b), rate in zip(gradients, rates, strict=True):
        change = [
            [float(g) + weight_decay * w for g, w in zip(g_row, w_row, strict=True)]
            for g_row, w_row in zip(grad_w, weight, strict=True)
        ]
        length, step = (math.sqrt(sum(v * v for row in rows for v in row)) for rows in (weight, change))
        scale = trust * length / step if length > 0 and step > 0 else 1.0
        for i, row in enumerate(change):
            for j, value in enumerate(row):
                momentum_w[i][j] = momentum * momentum_w[i][j] + scale * value
                weight[i][j] -= rate * momentum_w[i][j]
        for j, value in enumerate(grad_b):
            momentum_b[j] = momentum * momentum_b[j] + float(value)
            bias[j] -= rate * momentum_b[j]
    return weight, bias
