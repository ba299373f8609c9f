"""From masks to the packed sequences of a batch: the last decisions, taken on the host, in numpy.

`Packer` is what a loader's worker calls: it draws the masks and the stochastic depth of the samples at given
positions and returns the finished `Batch`. It is picklable and holds numbers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ijepa.masking.batch import Batch, Sequences
from ijepa.masking.masks import MaskRule, Masks, draw_masks
from ijepa.masking.token_budget import Budget
from ijepa.utils.random import Stream, uniform, words

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packer:
    """Draws everything a micro-batch needs beside its pixels, by the samples' positions.

    `depth` and `drop_path` are the context encoder's: layer l of L is dropped for an image with probability
    `drop_path * l / (L - 1)`, one draw for each image and layer (Huang et al., arXiv 1603.09382, section 3). With a
    `budget` the batch is padded to it.
    """

    rule: MaskRule
    grid: tuple[int, int]
    seed: int
    global_batch: int
    depth: int
    drop_path: float = 0.0
    budget: Budget | None = None

    def __call__(
        self,
        positions: Integers,
        pixels: torch.Tensor,
        indices: Sequence[int] = (),
        replaced: Sequence[str] = (),
    ) -> Batch:
        """Return the batch of the samples at `positions` (B,) with `pixels` (B, 3, H, W) uint8."""
        masks = draw_masks(self.rule, self.grid, self.seed, positions)
        kept = draw_depth(self.seed, positions, self.depth, self.drop_path)
        return pack(masks, pixels, self.global_batch, kept, positions, indices, replaced, self.budget)


def layer_rates(depth: int, drop_path: float) -> list[float]:
    """Probability with which stochastic depth drops each layer: linear from 0 to `drop_path`."""
    return [drop_path * layer / max(depth - 1, 1) for layer in range(depth)]


def draw_depth(seed: int, positions: npt.ArrayLike, depth: int, drop_path: float) -> npt.NDArray[np.bool_] | None:
    """Return (B, depth) booleans, True where a layer is kept for an image; None without stochastic depth."""
    if drop_path == 0:
        return None
    draw = uniform(words(seed, Stream.DEPTH, positions, depth))
    return draw >= np.asarray(layer_rates(depth, drop_path))


def pack(
    masks: Masks,
    pixels: torch.Tensor,
    global_batch: int,
    kept: npt.NDArray[np.bool_] | None = None,
    positions: Sequence[int] | Integers = (),
    indices: Sequence[int] | Integers = (),
    replaced: Sequence[str] = (),
    budget: Budget | None = None,
) -> Batch:
    """Pack masks (B images) and `kept` (B, layers) into a `Batch`, padded to `budget`; see there for the shapes."""
    images, blocks, patches = masks.targets.shape
    context = np.flatnonzero(masks.context)
    context_lengths = masks.context.sum(1)
    # Where layers are dropped, the last context row is padding: their own padding reads it and writes it.
    needed = len(context) + (kept is not None)
    context_room = budget.room(needed, budget.context) if budget else len(context)

    block_lengths = masks.targets.sum(2).reshape(-1)
    block_image = np.repeat(np.arange(images), blocks)[block_lengths > 0]
    flat_block, patch = np.divmod(np.flatnonzero(masks.targets), patches)
    targets = flat_block // blocks * patches + patch
    block_lengths = block_lengths[block_lengths > 0]

    # A predictor sequence: its image's context rows, then its own queries, which stand after all context rows.
    context_starts, target_starts = _starts(context_lengths), _starts(block_lengths)
    lengths = context_lengths[block_image] + block_lengths
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(len(sequence)) - _starts(lengths)[sequence]
    beyond = offset - context_lengths[block_image][sequence]
    row = np.where(
        beyond < 0,
        context_starts[block_image][sequence] + offset,
        context_room + target_starts[sequence] + beyond,
    )
    queries = np.flatnonzero(beyond >= 0)
    blocks_of_image = np.bincount(block_image, minlength=images)
    weight = np.repeat(1.0 / (block_lengths * blocks_of_image[block_image] * global_batch), block_lengths)
    packed = _sequences(context, context_lengths), _sequences(targets, block_lengths)
    guessing = _sequences(row, lengths), _sequences(queries, block_lengths)
    if budget:
        # Every padding query needs keys: the predictor has at least as much padding as the targets.
        spare = budget.room(len(targets), budget.targets) - len(targets)
        room = budget.room(len(row) + spare, budget.predictor)
        nothing, most = np.zeros(spare, dtype=np.int64), images * blocks
        count = most + -(-room // budget.limit)
        packed = (
            _padded(packed[0], np.zeros(context_room - len(context), np.int64), budget, images),
            _padded(packed[1], nothing, budget, most),
        )
        guessing = (
            _padded(guessing[0], np.zeros(room - len(row), np.int64), budget, most),
            _padded(guessing[1], len(row) + np.arange(spare), budget, most, count),
        )
        weight = np.concatenate([weight, nothing])
    return Batch(
        pixels=pixels,
        context=packed[0],
        targets=packed[1],
        predictor=guessing[0],
        queries=guessing[1],
        loss_weight=torch.from_numpy(weight.astype(np.float32)),
        kept=() if kept is None else _kept(kept, context_lengths, context_room, budget),
        positions=tuple(int(p) for p in positions),
        indices=tuple(int(i) for i in indices),
        replaced=tuple(replaced),
    )


def _kept(
    kept: npt.NDArray[np.bool_], lengths: Integers, rows: int, budget: Budget | None
) -> tuple[Sequences | None, ...]:
    """For each layer (B, layers) the context rows that are kept, of `rows`; padding is the last of these."""
    layers: list[Sequences | None] = []
    for layer, images in enumerate(kept.T):
        room = budget.layers[layer] if budget else None
        if room is None and images.all():
            layers.append(None)
            continue
        chosen = np.repeat(images, lengths)
        sequences = _sequences(np.flatnonzero(chosen), lengths[images])
        if budget:
            count = int(chosen.sum())
            spare = min(budget.room(max(count, 1), room or 0), rows) - count  # a layer without images still runs
            sequences = _padded(sequences, np.full(spare, rows - 1), budget, len(images))
        layers.append(sequences)
    return tuple(layers)


def _padded(sequences: Sequences, rows: Integers, budget: Budget, most: int, count: int | None = None) -> Sequences:
    """Append padding that reads `rows`, in sequences of at most `limit` tokens, and empty ones to a constant number.

    That is `count`, or else the `most` sequences there can be and those that would hold all tokens, were all padding.
    """
    tokens = len(sequences.index) + len(rows)
    slots = (count or most + -(-tokens // budget.limit)) - len(sequences.lengths)
    padding = (len(rows) - budget.limit * np.arange(slots)).clip(0, budget.limit)
    lengths = np.concatenate([sequences.lengths, padding]).astype(np.int64)
    whole = _sequences(np.concatenate([sequences.index.numpy(), rows]), lengths)
    real = torch.arange(tokens) < len(sequences.index)
    return Sequences(whole.index, whole.cu_seqlens, sequences.lengths, budget.limit, real)


def _sequences(index: Integers, lengths: Integers) -> Sequences:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Sequences(
        torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64)),
        torch.from_numpy(ends),
        tuple(lengths.tolist()),
    )


def _starts(lengths: Integers) -> Integers:
    return np.cumsum(lengths) - lengths
