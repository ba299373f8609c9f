"""Linear probe: many heads on frozen features, trained in one pass over the data; one of them is chosen.

Heads that read the same features after the same norm form a group, and all groups train on the same batches. Features
are computed once, or at each step if the protocol augments; a forward pass of the encoder then serves all heads.

By default the head is chosen on a part of the train set that no head was trained on, and only this head is evaluated on
the test set, as in CAPI (Darcet et al., arXiv 2502.08769, `eval_classification.py`). Many published numbers are those
of the best head on the test set. That choice makes results too good; protocols that make it, to be comparable with
such numbers, state so in the notes of their results.
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
from ijepa.evaluation.classification.linear_heads import LinearHeads, Norm
from ijepa.evaluation.context import DEFAULT_CONTEXT, EvaluationContext
from ijepa.evaluation.features.extract import Indices, PatchEncoder, encoder_blocks
from ijepa.evaluation.features.loaders import AugmentedLoader, CachedLoader, FeatureLoader, PatchLoader, Role
from ijepa.evaluation.features.sampling import hold_out
from ijepa.evaluation.features.standardize import mean_and_std
from ijepa.evaluation.metrics.accuracy import accuracies
from ijepa.evaluation.protocols import LinearProtocol
from ijepa.evaluation.results.schema import EvaluationResult, ResultRow
from ijepa.utils.errors import UserError
from ijepa.utils.schedules import half_cosine

Keep = Callable[[Tensor, Tensor], None]
"""Receives weight (C, D) and bias (C,) of a head."""

FLATTERED = (
    "the head was chosen on the test set, as in the published protocol: its accuracy and interval are too optimistic"
)


def evaluate_linear(
    encoders: Mapping[str, PatchEncoder],
    train: Source,
    test: Source,
    protocol: LinearProtocol,
    context: EvaluationContext = DEFAULT_CONTEXT,
    *,
    keep: Keep | None = None,
) -> EvaluationResult:
    """Evaluate encoders by linear or attentive probes.

    Args:
        encoders: the encoders by name.
        train, test: labeled sets.
        protocol: see `LinearProtocol`.
        context: its seed decides the held-out part, the order of images, crops and initial weights.
        keep: receives the best head of the first encoder that reads the last block only.

    Returns:
        See `classification.compare`. A row has `top1`, `top5`, `ci`, `heads` (their number) and `head`: `blocks`,
        `norm`, `lr` and `weight_decay` of the chosen head, `epoch` if the epoch was chosen too, and `edge` if its
        learning rate is the highest or lowest of the grid and no other head was as good. If the head was chosen on a
        held-out part, `held_out` is its accuracy there, which the choice makes slightly too good.

    Raises:
        UserError: as `classification.compare`, or `keep` is given and the protocol has no such head.
        RunError: as `classification.compare`.
    """
    if keep and (protocol.pools or 1 not in protocol.blocks or protocol.selection == "test-epochs"):
        hint = "use a protocol with blocks: [1] that chooses its head at the end"
        raise UserError(
            "--save-head", f"protocol {protocol.name} does not give one linear head on the last block", hint
        )
    first = next(iter(encoders.values()))
    method = Method(
        "linear",
        lambda split: probe(split, protocol, context.seed, keep=keep if split.origin.encoder is first else None),
        last=0 if protocol.pools else max(protocol.blocks),
        # If heads train on random crops, features of center crops only standardize, or score the held-out part.
        train_features=not protocol.augment or protocol.standardize or protocol.selection == "held-out",
        notes=(FLATTERED,) if protocol.flatters else (),
    )
    result = compare(method, encoders, train, test, protocol, context)
    return result.model_copy(update={"notes": (*result.notes, *edge_notes(result.rows))})


def edge_of(rates: Set[float], lrs: Sequence[float]) -> str | None:
    """Return "highest" or "lowest" if all of the best heads' `rates` are that end of the grid `lrs`, else None.

    If a head inside the grid is as good, a wider grid promises nothing. A grid of two rates has no inside.
    """
    if len(set(lrs)) < 3:
        return None
    return "highest" if rates == {max(lrs)} else "lowest" if rates == {min(lrs)} else None


def edge_notes(rows: Sequence[ResultRow]) -> list[str]:
    """Return a note for each end of the grid of learning rates at which heads were chosen."""
    notes = []
    for end in ("highest", "lowest"):
        at = [row for row in rows if row["head"].get("edge") == end]
        if at:
            names, rate = ", ".join(row.encoder for row in at), at[0]["head"]["lr"]
            what = f"has the {end} learning rate of the grid, {rate:g}"
            notes.append(f"the head chosen for {names} {what}; a wider grid may score higher")
    return notes


@dataclass(frozen=True)
class HeadGroup:
    """Heads that read the same last `blocks` blocks after the same norm."""

    blocks: int
    norm: Norm
    heads: LinearHeads | AttentiveHeads

    def select(self, x: Tensor) -> Tensor:
        """Return the input of the heads: (B, F) from mean patches (B, L, D), or all patches (B, N, D) as they are."""
        return x if isinstance(self.heads, AttentiveHeads) else x[:, -self.blocks :].flatten(1)


@dataclass(frozen=True)
class LabeledImages:
    """Images of the train or the test set by their numbers (n,), and their classes (n,)."""

    role: Role
    numbers: Indices
    y: Tensor

    @classmethod
    def of(cls, split: Split, role: Role, chosen: Indices | None = None) -> Self:
        """Return the images of one set; `chosen` are their numbers, all if None."""
        y = split.train_y if role == "train" else split.test_y
        numbers = np.arange(len(y)) if chosen is None else chosen
        return cls(role, numbers, y[torch.from_numpy(numbers)])

    def batches(self, loader: FeatureLoader) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features of center crops and classes, in order."""
        done = 0
        for x in loader.center_crops(self.role, self.numbers):
            yield x, self.y[done : done + len(x)]
            done += len(x)


@dataclass(frozen=True)
class Choice:
    """The chosen head and its accuracy on the images it was chosen on."""

    accuracy: float
    group: HeadGroup
    head: int
    equals: frozenset[int]
    """Numbers of all heads, in any group, with this accuracy; `head` is one of them."""


def probe(
    split: Split, protocol: LinearProtocol, seed: int, loader: FeatureLoader | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Train the heads of one encoder, choose one of them, and return its row.

    Args:
        split: features and classes.
        protocol: see `LinearProtocol`.
        seed: seed of all draws.
        loader: source of the features; as the protocol says if None.
        keep: see `evaluate_linear`.
    """
    loader = loader or make_loader(split, protocol, seed)
    train, test = LabeledImages.of(split, "train"), LabeledImages.of(split, "test")
    chosen_on, honest = test, protocol.selection == "held-out"
    if honest:
        held = hold_out(train.numbers, protocol.held_out, seed, train.y.numpy())
        chosen_on = LabeledImages.of(split, "train", train.numbers[held])
        train = LabeledImages.of(split, "train", train.numbers[~held])
    groups = make_groups(split, train.numbers, protocol, seed)
    best, ranks, best_epoch = None, None, None
    for epoch in train_heads(groups, loader, train, protocol, seed):
        if protocol.selection != "test-epochs":
            continue
        choice = choose_head(groups, loader, test)
        if best is None or choice.accuracy > best.accuracy:
            # Ranks are computed at once: the heads change in the next epoch.
            best, ranks, best_epoch = choice, ranks_of_choice(choice, loader, test), epoch
    if best is None or ranks is None:
        best = choose_head(groups, loader, chosen_on)
        ranks = ranks_of_choice(best, loader, test)
    if keep is not None:
        alone = choose_head([group for group in groups if group.blocks == 1], loader, chosen_on)
        assert isinstance(alone.group.heads, LinearHeads)
        keep(*alone.group.heads.layer(alone.head))
    return {
        **accuracies(ranks),
        **({"held_out": best.accuracy} if honest else {}),
        "heads": sum(len(group.heads) for group in groups),
        "head": describe_choice(best, best_epoch, protocol),
    }


def describe_choice(choice: Choice, epoch: int | None, protocol: LinearProtocol) -> dict[str, Any]:
    """Return the entry `head` of a row; see `evaluate_linear`."""
    grid = tuple(product(protocol.lrs, protocol.weight_decays))
    lr, weight_decay = grid[choice.head]
    found = {"blocks": choice.group.blocks, "norm": choice.group.norm, "lr": lr, "weight_decay": weight_decay}
    edge = edge_of({grid[head][0] for head in choice.equals}, protocol.lrs)
    return found | ({} if edge is None else {"edge": edge}) | ({} if epoch is None else {"epoch": epoch})


def make_loader(split: Split, protocol: LinearProtocol, seed: int) -> FeatureLoader:
    """Return the source of features that a protocol asks for."""
    if protocol.pools:
        return PatchLoader(split, protocol, seed)
    return AugmentedLoader(split, protocol, seed) if protocol.augment else CachedLoader(split)


def make_groups(split: Split, train: Indices, protocol: LinearProtocol, seed: int) -> list[HeadGroup]:
    """Return untrained heads; features are standardized by those of the train images with numbers `train`."""
    # Learning rates of protocols are for 256 images (Goyal et al., arXiv 1706.02677, section 2.1).
    scale = min(protocol.batch, len(train)) / 256
    grid = [(lr * scale, decay) for lr, decay in product(protocol.lrs, protocol.weight_decays)]
    if protocol.pools:
        return [HeadGroup(1, "none", _attentive_heads(split, grid, protocol, seed))]
    groups = []
    for blocks in sorted({min(blocks, split.test_x.shape[1]) for blocks in protocol.blocks}):
        width, fixed = split.test_x[0, -blocks:].numel(), None
        if protocol.standardize:
            fixed = mean_and_std(split.train_x[torch.from_numpy(train), -blocks:].flatten(1))
        for norm in protocol.norms:
            heads = LinearHeads(
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
                device=split.device,
            )
            groups.append(HeadGroup(blocks, norm, heads))
    return groups


def _attentive_heads(
    split: Split, grid: list[tuple[float, float]], protocol: LinearProtocol, seed: int
) -> AttentiveHeads:
    encoder, attention_heads = split.origin.encoder, protocol.attention_heads
    if attention_heads is None and protocol.head == "attentive":
        blocks = encoder_blocks(encoder)
        attention_heads = int(blocks[0].attn.heads) if blocks else None  # type: ignore[union-attr, arg-type]
    return AttentiveHeads(
        encoder.embed_dim,
        split.classes,
        grid,
        kind=AttentiveHead if protocol.head == "attentive" else QueryHead,
        attention_heads=attention_heads,
        betas=protocol.betas,
        clip=protocol.clip,
        final_decay=protocol.final_weight_decay,
        seed=seed,
        device=split.device,
    )


def train_heads(
    groups: list[HeadGroup], loader: FeatureLoader, train: LabeledImages, protocol: LinearProtocol, seed: int
) -> Iterator[int]:
    """Train all heads in one pass over the train images; yield the number of each epoch at its end."""
    plan = StepPlan.of(len(train.numbers), protocol)
    for step in range(1, plan.steps + 1):
        positions = plan.positions(step)
        places = sample_indices(seed, positions, len(train.numbers))
        x, y = loader.train_batch(positions, train.numbers[places]), train.y[torch.from_numpy(places)]
        factor = rate_factor(step, plan.steps, protocol, epoch=plan.epochs(step - 1))
        for group in groups:
            group.heads.step(group.select(x), y, factor, (step - 1) / plan.steps)
        epochs = int(plan.epochs(step))
        if step == plan.steps or epochs > int(plan.epochs(step - 1)):
            yield max(1, epochs)


@dataclass(frozen=True)
class StepPlan:
    """Which places of the endless sequence of train images each step reads.

    The sequence holds all images once per epoch, in a different order in each.
    """

    images: int
    batch: int
    epoch: int
    """Images in all batches of an epoch, with an incomplete last batch counted as full."""
    steps: int
    wraps: bool
    """Whether the last batch of an epoch is filled with the first images of the next."""

    @classmethod
    def of(cls, images: int, protocol: LinearProtocol) -> Self:
        """Return the plan of a protocol for a train set of this size."""
        batch = min(protocol.batch, images)
        batches = {"keep": -(-images // batch), "drop": images // batch}
        wraps = protocol.last_batch == "wrap"
        epoch = images if wraps else batch * batches[protocol.last_batch]
        steps = math.ceil(protocol.epochs * epoch / batch)
        return cls(images, batch, epoch, steps if protocol.steps is None else min(protocol.steps, steps), wraps)

    def epochs(self, steps: int) -> float:
        """Return the number of epochs after this number of steps."""
        return steps * self.batch / self.epoch

    def positions(self, step: int) -> Indices:
        """Return the places (B,) in the sequence for a step, counted from 1."""
        epoch, first = divmod((step - 1) * self.batch, self.epoch)
        last = first + self.batch if self.wraps else min(first + self.batch, self.images)
        return np.arange(first, last) + epoch * self.images


def choose_head(groups: list[HeadGroup], loader: FeatureLoader, images: LabeledImages) -> Choice:
    """Return the head with the highest accuracy on the images, the first one if several have it."""
    correct = [torch.zeros(len(group.heads), dtype=torch.int64) for group in groups]
    for x, y in images.batches(loader):
        for count, group in zip(correct, groups, strict=True):
            score, guess = group.heads.logits(group.select(x)).max(2)  # (B, H)
            # Logits of a head that diverged are not finite. Its guess is class 0 then, and counts as wrong.
            count += ((guess.cpu() == y[:, None]) & score.isfinite().cpu()).sum(0)
    most = int(torch.cat(correct).max())
    heads = [
        (group, int(head)) for count, group in zip(correct, groups, strict=True) for head in (count == most).nonzero()
    ]
    group, first = heads[0]
    return Choice(most / len(images.numbers), group, first, frozenset(head for _, head in heads))


def ranks_of_choice(choice: Choice, loader: FeatureLoader, images: LabeledImages) -> Tensor:
    """Return the ranks (n,) of the images' true classes by the chosen head."""
    group = choice.group
    return torch.cat([group.heads.class_ranks(group.select(x), y, choice.head) for x, y in images.batches(loader)])


def rate_factor(step: int, steps: int, protocol: LinearProtocol, *, epoch: float) -> float:
    """Return the factor on the learning rates at a step, counted from 1, after `epoch` epochs."""
    warmup, done, closed = round(protocol.warmup * steps), step - 1, protocol.ramp == "closed"
    if done < warmup:
        return step / warmup if protocol.ramp == "open" else done / max(1, warmup - closed)
    if protocol.milestones:
        return float(0.1 ** sum(epoch >= milestone for milestone in protocol.milestones))
    return half_cosine((done - warmup) / max(1, steps - warmup - closed))
