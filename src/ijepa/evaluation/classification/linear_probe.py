"""Linear probe: many heads on frozen features trained in one pass over the data, one of them chosen.

Heads over the same features and behind the same norm are one batched product (`heads`), and all such groups read each
batch (`reading`): features that were made once, or, where the protocol augments, those of a random view, made for all
of them. Central views of the train images are made there too, once: the held-out part is scored on them.

By default the head is chosen on a part of the train set that no head was trained on, and only that head meets the test
set, as in CAPI (Darcet et al., arXiv 2502.08769, `eval_classification.py`). Choosing the best of the grid on the test
set, as many published numbers do, flatters every encoder by what the grid's noise gives; protocols that do so, to be
compared with those numbers, say it in their result's notes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ijepa.data.loading.shuffle import sample_indices
from ijepa.data.sources.base import Source
from ijepa.evaluation.classification.attentive_heads import AttentiveHead, AttentiveHeads, QueryHead
from ijepa.evaluation.classification.compare import Method, Split, compare
from ijepa.evaluation.classification.linear_heads import Heads, Norm
from ijepa.evaluation.context import DEFAULT_CONTEXT, EvaluationContext
from ijepa.evaluation.features.extract import Encoder, Indices
from ijepa.evaluation.features.loaders import Augmented, Cached, Reading, Role, Tokens
from ijepa.evaluation.features.sampling import hold_out
from ijepa.evaluation.features.standardize import mean_and_std
from ijepa.evaluation.metrics.accuracy import accuracies
from ijepa.evaluation.protocols import LinearProtocol
from ijepa.evaluation.results.schema import EvaluationResult, ResultRow
from ijepa.utils.errors import UserError

Keep = Callable[[Tensor, Tensor], None]
"""Takes a head's weight (C, D) and bias (C,)."""

FLATTERED = "the head was chosen on the test set, as the protocol was published: its accuracy and interval flatter"


def evaluate_linear(
    encoders: Mapping[str, Encoder],
    train: Source,
    test: Source,
    protocol: LinearProtocol,
    context: EvaluationContext = DEFAULT_CONTEXT,
    *,
    keep: Keep | None = None,
) -> EvaluationResult:
    """Evaluate encoders by linear probes; the context's seed decides what is held out and the order of batches.

    `keep` is given the first encoder's best head on its last block alone.

    Returns:
        See `classification.compare`; a row has `top1`, `top5`, `ci`, `heads` (how many were trained), `head` (`blocks`,
        `norm`, `lr`, `weight_decay` of the chosen one; `epoch` where that was chosen too; `edge` where its rate is the
        highest or lowest of the grid, and no other as good) and, where it was chosen on a held-out part, `held_out`,
        its accuracy there, a little flattered by the choice.

    Raises:
        UserError, RunError: as `classification.compare`; or `keep`, and the protocol has no such head.
    """
    if keep and (protocol.pools or 1 not in protocol.blocks or protocol.selection == "test-epochs"):
        hint = "use a protocol with blocks: [1] that chooses its head at the end"
        raise UserError("--save-head", f"protocol {protocol.name} ends with no linear head on the last block", hint)
    first = next(iter(encoders.values()))
    method = Method(
        "linear",
        lambda split: probe(split, protocol, context.seed, keep=keep if split.origin.encoder is first else None),
        last=0 if protocol.pools else max(protocol.blocks),
        # Where heads train on random views, central ones of the train images are only standardised or chosen by.
        train_features=not protocol.augment or protocol.standardise or protocol.selection == "held-out",
        notes=(FLATTERED,) if protocol.flatters else (),
    )
    result = compare(method, encoders, train, test, protocol, context)
    return result.model_copy(update={"notes": (*result.notes, *edge_notes(result.rows))})


def edge_of(rates: Set[float], lrs: Sequence[float]) -> str | None:
    """Return the end of a grid of learning rates, highest or lowest, that the best heads' `rates` lie at, else None.

    Where a head within the grid is as good, a wider grid promises nothing. A grid of two rates is all ends.
    """
    if len(set(lrs)) < 3:
        return None
    return "highest" if rates == {max(lrs)} else "lowest" if rates == {min(lrs)} else None


def edge_notes(rows: Sequence[ResultRow]) -> list[str]:
    """Return a line for each end of the grid of learning rates that rows' heads lie at."""
    notes = []
    for end in ("highest", "lowest"):
        at = [row for row in rows if row["head"].get("edge") == end]
        if at:
            names, rate = ", ".join(row.encoder for row in at), at[0]["head"]["lr"]
            what = f"has the {end} learning rate of the grid, {rate:g}"
            notes.append(f"the head chosen for {names} {what}; a wider grid may score higher")
    return notes


@dataclass(frozen=True)
class Group:
    """Heads that read the last `blocks` blocks behind one norm."""

    blocks: int
    norm: Norm
    heads: Heads | AttentiveHeads

    def read(self, x: Tensor) -> Tensor:
        """Return what they read of an image: (n, F) of the blocks' means (n, L, D), or all patches (n, N, D)."""
        return x if isinstance(self.heads, AttentiveHeads) else x[:, -self.blocks :].flatten(1)

    def step(self, x: Tensor, y: Tensor, factor: float, progress: float) -> None:
        """Train them by one batch, with `factor` on their rates, `progress` of all steps done."""
        if isinstance(self.heads, AttentiveHeads):
            self.heads.step(self.read(x), y, factor, progress)
        else:
            self.heads.step(self.read(x), y, factor)


@dataclass(frozen=True)
class Choice:
    """One head and how it fared where it was chosen."""

    accuracy: float
    group: Group
    head: int
    equals: frozenset[int]
    """Numbers of the heads, in any group, that are as often right; its own is among them."""


def probe(
    split: Split, protocol: LinearProtocol, seed: int, reading: Reading | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Train the heads of one encoder, choose one by the protocol's rule, and return its row.

    `reading` is where features come from, the protocol's own way if None; `keep` gets the best head on the last block.
    """
    reading = reading or reading_of(split, protocol, seed)
    places = np.arange(len(split.train_y))
    honest = protocol.selection == "held-out"
    held = (
        hold_out(places, protocol.held_out, seed, split.train_y.numpy())
        if honest
        else np.zeros(len(places), dtype=np.bool_)
    )
    groups = make_groups(split, places[~held], protocol, seed)
    tests = np.arange(len(split.test_y))
    epoch_of_best, ranks, best = None, torch.empty(0), None
    for epoch in train_heads(groups, reading, split.train_y, places[~held], protocol, seed):
        if protocol.selection != "test-epochs":
            continue
        choice = choose_head(groups, reading, "test", tests, split.test_y)
        if best is None or choice.accuracy > best.accuracy:
            best, epoch_of_best = choice, epoch
            ranks = ranks_by(choice, reading, tests, split.test_y)
    if best is None and honest:
        best = choose_head(groups, reading, "train", places[held], split.train_y)
    if best is None:
        best = choose_head(groups, reading, "test", tests, split.test_y)
    if epoch_of_best is None:
        ranks = ranks_by(best, reading, tests, split.test_y)
    if keep is not None:
        last = [group for group in groups if group.blocks == 1]
        alone = (
            choose_head(last, reading, "train", places[held], split.train_y)
            if honest
            else choose_head(last, reading, "test", tests, split.test_y)
        )
        assert isinstance(alone.group.heads, Heads)
        keep(*alone.group.heads.plain(alone.head))
    grid = tuple(product(protocol.lrs, protocol.weight_decays))
    lr, weight_decay = grid[best.head]
    chosen: dict[str, Any] = {"blocks": best.group.blocks, "norm": best.group.norm, "lr": lr}
    chosen["weight_decay"] = weight_decay
    edge = edge_of({grid[head][0] for head in best.equals}, protocol.lrs)
    if edge is not None:
        chosen["edge"] = edge
    return {
        **accuracies(ranks),
        **({"held_out": best.accuracy} if honest else {}),
        "heads": sum(len(group.heads) for group in groups),
        "head": chosen if epoch_of_best is None else {**chosen, "epoch": epoch_of_best},
    }


def reading_of(split: Split, protocol: LinearProtocol, seed: int) -> Reading:
    """Return where a protocol's heads read."""
    if protocol.pools:
        return Tokens(split, protocol, seed)
    return Augmented(split, protocol, seed) if protocol.augment else Cached(split)


def make_groups(split: Split, kept: Indices, protocol: LinearProtocol, seed: int) -> list[Group]:
    """Return untrained heads; figures that features are standardised by come from the train images `kept`."""
    batch = min(protocol.batch, len(kept))
    grid = [(lr * batch / 256, decay) for lr, decay in product(protocol.lrs, protocol.weight_decays)]
    if protocol.pools:
        encoder = split.origin.encoder
        own = attention_heads_of(encoder) if protocol.head == "attentive" else None
        attentive = AttentiveHeads(
            encoder.embed_dim,
            split.classes,
            grid,
            kind=AttentiveHead if protocol.head == "attentive" else QueryHead,
            attention_heads=protocol.attention_heads or own,
            betas=protocol.betas,
            clip=protocol.clip,
            final_decay=protocol.final_weight_decay,
            seed=seed,
            device=split.device,
        )
        return [Group(1, "none", attentive)]
    groups, device = [], split.device
    for blocks in sorted({min(blocks, split.test_x.shape[1]) for blocks in protocol.blocks}):
        width, fixed = split.test_x[0, -blocks:].numel(), None
        if protocol.standardise:
            fixed = mean_and_std(split.train_x[torch.from_numpy(kept), -blocks:].flatten(1))
        for norm in protocol.norms:
            heads = Heads(
                width,
                split.classes,
                grid,
                norm=norm,
                eps=protocol.norm_eps,
                norm_batch=protocol.norm_batch,
                fixed=fixed,
                optimizer=protocol.optimizer,
                betas=protocol.betas,
                momentum=protocol.momentum,
                decay_bias=protocol.decay_bias,
                initial_std=protocol.initial_std,
                seed=seed,
                device=device,
            )
            groups.append(Group(blocks, norm, heads))
    return groups


def attention_heads_of(encoder: Encoder) -> int | None:
    """Return how many attention heads an encoder's blocks have, None where it does not tell."""
    blocks = getattr(getattr(encoder, "vit", None), "blocks", None)
    return int(blocks[0].attn.heads) if blocks else None


def train_heads(
    groups: list[Group], reading: Reading, y: Tensor, kept: Indices, protocol: LinearProtocol, seed: int
) -> Iterator[int]:
    """Train all heads in one pass over the train images `kept` of classes `y`; yield each epoch's number at its end."""
    walk = Walk.of(len(kept), protocol)
    for step in range(1, walk.steps + 1):
        positions = walk.positions(step)
        chosen = kept[sample_indices(seed, positions, len(kept))]
        x, truth = reading.training(positions, chosen), y[torch.from_numpy(chosen)]
        factor = rate_factor(step, walk.steps, protocol, epoch=walk.epochs(step - 1))
        for group in groups:
            group.step(x, truth, factor, (step - 1) / walk.steps)
        done = int(walk.epochs(step))
        if step == walk.steps or done > int(walk.epochs(step - 1)):
            yield max(1, done)


@dataclass(frozen=True)
class Walk:
    """How steps walk through a train set: `steps` of them, `batch` of `images` at a time, `epoch` batches' images each.

    Images stand in one endless sequence, epoch after epoch, each in an order of its own.
    """

    images: int
    batch: int
    epoch: int
    steps: int
    wraps: bool

    @classmethod
    def of(cls, images: int, protocol: LinearProtocol) -> Self:
        """Return a protocol's walk through so many images."""
        batch = min(protocol.batch, images)
        batches = {"keep": -(-images // batch), "drop": images // batch}
        wraps = protocol.last_batch == "wrap"
        epoch = images if wraps else batch * batches[protocol.last_batch]
        steps = math.ceil(protocol.epochs * epoch / batch)
        return cls(images, batch, epoch, steps if protocol.steps is None else min(protocol.steps, steps), wraps)

    def epochs(self, steps: int) -> float:
        """Return how many epochs are done after so many steps."""
        return steps * self.batch / self.epoch

    def positions(self, step: int) -> Indices:
        """Return the places (B,) in the sequence that a step of 1 to `steps` reads."""
        epoch, first = divmod((step - 1) * self.batch, self.epoch)
        last = first + self.batch if self.wraps else min(first + self.batch, self.images)
        return np.arange(first, last) + epoch * self.images


def choose_head(groups: list[Group], reading: Reading, role: Role, places: Indices, y: Tensor) -> Choice:
    """Return the head that is most often right on images of classes y[places]; of equals, the first."""
    right = [torch.zeros(len(group.heads), dtype=torch.int64) for group in groups]
    done = 0
    for x in reading.central(role, places):
        truth = y[torch.from_numpy(places[done : done + len(x)])]
        done += len(x)
        for count, group in zip(right, groups, strict=True):
            best, guess = group.heads.logits(group.read(x)).max(2)
            count += ((guess.cpu() == truth[:, None]) & best.isfinite().cpu()).sum(0)  # one that diverged is wrong
    most = int(torch.cat(right).max())
    heads = [
        (group, int(head)) for count, group in zip(right, groups, strict=True) for head in (count == most).nonzero()
    ]
    group, first = heads[0]
    return Choice(most / len(places), group, first, frozenset(head for _, head in heads))


def ranks_by(choice: Choice, reading: Reading, places: Indices, y: Tensor) -> Tensor:
    """Return the true classes' ranks (m,) in the test set by the chosen head."""
    ranks, done = [], 0
    for x in reading.central("test", places):
        truth = y[torch.from_numpy(places[done : done + len(x)])]
        done += len(x)
        ranks.append(choice.group.heads.ranks(choice.group.read(x), truth, choice.head))
    return torch.cat(ranks)


def rate_factor(step: int, steps: int, protocol: LinearProtocol, *, epoch: float) -> float:
    """Return the factor on the learning rates at a step of 1 to `steps`, after `epoch` passes."""
    rise, done, closed = round(protocol.warmup * steps), step - 1, protocol.ramp == "closed"
    if done < rise:
        return step / rise if protocol.ramp == "open" else done / max(1, rise - closed)
    if protocol.milestones:
        return float(0.1 ** sum(epoch >= milestone for milestone in protocol.milestones))
    return (1 + math.cos(math.pi * (done - rise) / max(1, steps - rise - closed))) / 2
