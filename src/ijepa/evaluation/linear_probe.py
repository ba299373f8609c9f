"""Linear probe: many heads on frozen features trained in one pass over the data, one of them chosen.

Heads over the same features and behind the same norm are one batched product (`heads`), and all such groups read each
batch: from features that were made once, or, where the protocol augments, from those of a random view, made for all
of them (`augmented`). Central views of the train images are made there too, once: the held-out part is scored on them.

By default the head is chosen on a part of the train set that no head was trained on, and only that head meets the test
set, as in CAPI (Darcet et al., arXiv 2502.08769, `eval_classification.py`). Choosing the best of the grid on the test
set, as many published numbers do, flatters every encoder by what the grid's noise gives; protocols that do so, to be
compared with those numbers, say it in their result's notes.
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
from ijepa.evaluation.augmented import AugmentedFeatures
from ijepa.evaluation.bank import hold_out
from ijepa.evaluation.classification import Split, Views, compare
from ijepa.evaluation.features import Encoder, Indices, Progress
from ijepa.evaluation.heads import Heads, Norm
from ijepa.evaluation.protocol import LinearProtocol
from ijepa.evaluation.result import accuracies, statistics

FLATTERED = "the head was chosen on the test set, as the protocol was published: its accuracy and interval flatter"


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
        See `classification.compare`; a row has `top1`, `top5`, `ci`, `heads` (how many were trained), `head` (`blocks`,
        `norm`, `lr`, `weight_decay` of the chosen one; `epoch` where that was chosen too) and, where it was chosen on a
        held-out part, `held_out`, its accuracy there, a little flattered by the choice.

    Raises:
        Refused, Failed: as `classification.compare`.
    """

    def views(encoder: Encoder, used: Indices, size: tuple[int, int]) -> Views:
        return AugmentedFeatures(
            encoder,
            train,
            used,
            image_size=size,
            last=max(protocol.blocks),
            scale=protocol.crop_scale,
            flip=0.5,
            seed=seed,
            batch=protocol.forward_batch,
        )

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
        notes=() if protocol.selection == "held-out" else (FLATTERED,),
        views=views if protocol.augment else None,
    )


@dataclass(frozen=True)
class Group:
    """Heads that read the last `blocks` blocks behind one norm."""

    blocks: int
    norm: Norm
    heads: Heads

    def read(self, x: Tensor) -> Tensor:
        """Return what they read, (n, F), of features (n, L, D)."""
        return x[:, -self.blocks :].flatten(1)


@dataclass(frozen=True)
class Choice:
    """One head and how it fared where it was chosen."""

    accuracy: float
    group: Group
    head: int


def probe(split: Split, protocol: LinearProtocol, seed: int) -> dict[str, Any]:
    """Train the heads of one encoder, choose one by the protocol's rule, and return its row."""
    honest = protocol.selection == "held-out"
    held = (
        hold_out(np.arange(len(split.train_y)), protocol.held_out, seed)
        if honest
        else np.zeros(len(split.train_y), bool)
    )
    kept = np.flatnonzero(~held)
    groups = make_groups(split, kept, protocol, seed)
    grid = tuple(product(protocol.lrs, protocol.weight_decays))
    epoch_of_best, ranks, best = None, torch.empty(0), None
    for epoch in train_heads(groups, split, kept, protocol, seed):
        if protocol.selection != "test-epochs":
            continue
        choice = choose_head(groups, split.test_x, split.test_y)
        if best is None or choice.accuracy > best.accuracy:
            best, epoch_of_best = choice, epoch
            ranks = choice.group.heads.ranks(choice.group.read(split.test_x), split.test_y, choice.head)
    if best is None:
        where = torch.from_numpy(np.flatnonzero(held))
        x, y = (split.train_x[where], split.train_y[where]) if honest else (split.test_x, split.test_y)
        best = choose_head(groups, x, y)
        ranks = best.group.heads.ranks(best.group.read(split.test_x), split.test_y, best.head)
    lr, weight_decay = grid[best.head]
    chosen = {"blocks": best.group.blocks, "norm": best.group.norm, "lr": lr, "weight_decay": weight_decay}
    return {
        **accuracies(ranks),
        **({"held_out": best.accuracy} if honest else {}),
        "heads": sum(len(group.heads) for group in groups),
        "head": chosen if epoch_of_best is None else {**chosen, "epoch": epoch_of_best},
    }


def make_groups(split: Split, kept: Indices, protocol: LinearProtocol, seed: int) -> list[Group]:
    """Return untrained heads; figures that features are standardised by come from the train images `kept`."""
    batch = min(protocol.batch, len(kept))
    grid = [(lr * batch / 256, decay) for lr, decay in product(protocol.lrs, protocol.weight_decays)]
    groups = []
    for blocks in sorted({min(blocks, split.train_x.shape[1]) for blocks in protocol.blocks}):
        x = split.train_x[:, -blocks:].flatten(1)
        fixed = statistics(x[torch.from_numpy(kept)]) if protocol.standardise else None
        for norm in protocol.norms:
            heads = Heads(
                x.shape[1],
                split.classes,
                grid,
                norm=norm,
                eps=protocol.norm_eps,
                fixed=fixed,
                optimizer=protocol.optimizer,
                betas=protocol.betas,
                momentum=protocol.momentum,
                initial_std=protocol.initial_std,
                seed=seed,
            )
            groups.append(Group(blocks, norm, heads))
    return groups


def train_heads(groups: list[Group], split: Split, kept: Indices, protocol: LinearProtocol, seed: int) -> Iterator[int]:
    """Train all heads in one pass over the train images `kept`; yield each epoch's number, from 1, when it is over."""
    n, batch = len(kept), min(protocol.batch, len(kept))
    steps = math.ceil(protocol.epochs * n / batch)
    steps = steps if protocol.steps is None else min(protocol.steps, steps)
    for step, positions in enumerate(_positions(batch, steps), start=1):
        chosen = kept[sample_indices(seed, positions, n)]
        places = torch.from_numpy(chosen)
        x = split.train_x[places] if split.views is None else split.views(positions, chosen)
        factor = rate_factor(step, steps, protocol, epoch=(step - 1) * batch / n)
        for group in groups:
            group.heads.step(group.read(x), split.train_y[places], factor)
        before, done = (step - 1) * batch // n, step * batch // n
        if done > before or step == steps:
            yield max(done, before + (step == steps))


def choose_head(groups: list[Group], x: Tensor, y: Tensor) -> Choice:
    """Return the head that is most often right on features (n, L, D); of equals, the first."""
    choices = []
    for group in groups:
        right = group.heads.accuracy(group.read(x), y).numpy()
        choices.append(Choice(float(right.max()), group, int(np.argmax(right))))
    return max(choices, key=lambda choice: choice.accuracy)


def rate_factor(step: int, steps: int, protocol: LinearProtocol, *, epoch: float) -> float:
    """Return the factor on the learning rates at a step of 1 to `steps`, `epoch` passes after the first."""
    rise = round(protocol.warmup * steps)
    if step <= rise:
        return step / rise
    if protocol.milestones:
        return float(0.1 ** sum(epoch >= milestone for milestone in protocol.milestones))
    return (1 + math.cos(math.pi * (step - 1 - rise) / (steps - rise))) / 2


def _positions(batch: int, steps: int) -> Iterator[Indices]:
    """Yield the places (B,) of each step in the endless sequence of samples."""
    for step in range(steps):
        yield np.arange(step * batch, (step + 1) * batch)
