"""Linear probe: many heads on frozen features trained as one product, one of them chosen honestly.

All heads of a group read the same features, so their weights lie side by side as (F, H, C) and a step is two matrix
products, (B, F) x (F, H C) and (F, B) x (B, H C), with a learning rate and a weight decay for every head. The gradient
of the mean cross-entropy is written out: softmax minus truth; there is no graph to build. Heads start at zero, since
the problem is convex and nothing has to be drawn.

The head is chosen on a part of the train set that no head was trained on, and only that head meets the test set, as
in CAPI (Darcet et al., arXiv 2502.08769, `eval_classification.py`). Choosing the best of the grid on the test set, as
many published numbers do, flatters every encoder by what the grid's noise gives.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa.data.order import sample_indices
from ijepa.data.sources import Source
from ijepa.evaluation.bank import hold_out
from ijepa.evaluation.classification import Split, compare
from ijepa.evaluation.features import Encoder, Progress
from ijepa.evaluation.protocol import LinearProtocol
from ijepa.evaluation.result import accuracies, ranks_of, statistics

EPS = 1e-8


def evaluate_linear(
    encoders: Mapping[str, Encoder],
    train: Source,
    test: Source,
    protocol: LinearProtocol,
    *,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate encoders by linear probes; `seed` decides what is held out and the order of batches.

    Returns:
        See `classification.compare`; a row has `top1`, `top5`, `ci`, `held_out` (the chosen head's accuracy there, a
        little flattered by the choice) and `head` (`blocks`, `lr`, `weight_decay`).

    Raises:
        Refused, Failed: as `classification.compare`.
    """
    return compare(
        "linear",
        encoders,
        train,
        test,
        protocol,
        lambda split: probe(split, protocol, seed),
        last=max(protocol.blocks),
        seed=seed,
        cache=cache,
        progress=progress,
    )


def probe(split: Split, protocol: LinearProtocol, seed: int) -> dict[str, Any]:
    """Train the heads of one encoder, choose one on the held-out part, read the test set once; return its row."""
    held = torch.from_numpy(hold_out(np.arange(len(split.train_y)), protocol.held_out, seed))
    grid = tuple(product(protocol.lrs, protocol.weight_decays))
    best: tuple[float, int, int, Heads] | None = None
    for blocks in sorted({min(blocks, split.train_x.shape[1]) for blocks in protocol.blocks}):
        x = split.train_x[:, -blocks:].flatten(1)
        heads = train_heads(x[~held], split.train_y[~held], split.classes, grid, protocol, seed)
        right = heads.accuracy(x[held], split.train_y[held])
        head = int(np.argmax(right.numpy()))  # the first of equals
        if best is None or float(right[head]) > best[0]:
            best = float(right[head]), blocks, head, heads
    assert best is not None  # a protocol has at least one number of blocks
    accuracy, blocks, head, heads = best
    ranks = heads.ranks(split.test_x[:, -blocks:].flatten(1), split.test_y, head)
    lr, weight_decay = grid[head]
    return {
        **accuracies(ranks),
        "held_out": accuracy,
        "head": {"blocks": blocks, "lr": lr, "weight_decay": weight_decay},
    }


@dataclass(frozen=True)
class Heads:
    """Linear heads over the same features.

    Attributes:
        weight: (F, H, C).
        bias: (H, C).
        shift, scale: (F,), taken from and divided out of the features first.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Return (B, H, C) for features (B, F) of any floating type."""
        return (self.prepared(x) @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias

    def prepared(self, x: Tensor) -> Tensor:
        """Return features (B, F) as the heads read them, float32."""
        return (x.float() - self.shift) / self.scale

    def accuracy(self, x: Tensor, y: Tensor, batch: int = 1024) -> Tensor:
        """Return every head's top-1 accuracy (H,) on features (n, F)."""
        right = torch.zeros(len(self.bias), dtype=torch.int64)
        for part, truth in zip(x.split(batch), y.split(batch), strict=True):
            right += (self.logits(part).argmax(2) == truth[:, None]).sum(0)
        return right.double() / len(x)

    def ranks(self, x: Tensor, y: Tensor, head: int, batch: int = 4096) -> Tensor:
        """Return the true classes' ranks (n,) by one head."""
        weight, bias = self.weight[:, head], self.bias[head]
        parts = zip(x.split(batch), y.split(batch), strict=True)
        return torch.cat([ranks_of(self.prepared(part) @ weight + bias, truth) for part, truth in parts])


def train_heads(
    x: Tensor, y: Tensor, classes: int, grid: tuple[tuple[float, float], ...], protocol: LinearProtocol, seed: int
) -> Heads:
    """Train a head for every (learning rate per 256 images, weight decay) of `grid`, all in one pass over (n, F)."""
    shift, scale = statistics(x) if protocol.standardise else (torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
    heads = Heads(torch.zeros(x.shape[1], len(grid), classes), torch.zeros(len(grid), classes), shift, scale)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (heads.weight, heads.bias)]
    beta1, beta2 = protocol.betas
    batch = min(protocol.batch, len(x))
    lr, decay = torch.tensor(grid, dtype=torch.float32).T[..., None]  # (H, 1) each
    lr = lr * batch / 256
    steps = min(protocol.steps, math.ceil(protocol.epochs * len(x) / batch))
    for step, chosen in enumerate(_batches(len(x), batch, steps, seed), start=1):
        part, truth = heads.prepared(x[chosen]), y[chosen]
        error = (part @ heads.weight.flatten(1)).unflatten(1, heads.bias.shape).add_(heads.bias).softmax(2)
        error[torch.arange(batch), :, truth] -= 1
        error /= batch
        gradients = ((part.T @ error.flatten(1)).view_as(heads.weight), error.sum(0))
        rate = lr * _schedule(step, steps, protocol.warmup)
        heads.weight.mul_(1 - rate * decay)
        for values, gradient, (mean, square) in zip((heads.weight, heads.bias), gradients, moments, strict=True):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            length = (square / (1 - beta2**step)).sqrt_().add_(EPS)
            values.sub_(mean / length * (rate / (1 - beta1**step)))
    return heads


def _batches(n: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield sample numbers (B,), epoch after epoch in an order of its own, across their borders."""
    drawn = max(1, 65536 // batch)  # steps whose order is computed together
    for first in range(0, steps, drawn):
        positions = np.arange(first * batch, min(first + drawn, steps) * batch)
        yield from torch.from_numpy(sample_indices(seed, positions, n)).split(batch)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rate at a step of 1 to `steps`: a linear rise, then a cosine to 0."""
    rise = round(warmup * steps)
    if step <= rise:
        return step / rise
    return (1 + math.cos(math.pi * (step - 1 - rise) / (steps - rise))) / 2
