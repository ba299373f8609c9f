"""From masks to the packed sequences of a batch, in numpy on the host.

A loader worker calls `Packer`: it draws the masks and the stochastic depth of the samples at given positions and
returns the `Batch`. A packer is picklable and holds numbers only. Symbols are those of `ijepa.masking.batch`, and T
target blocks per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ijepa.masking.batch import Batch, Sequences
from ijepa.masking.masks import Booleans, Grid, Integers, MaskRule, Masks, draw_masks
from ijepa.masking.token_budget import Budget
from ijepa.utils.random import Stream, random_bits, uniform


@dataclass(frozen=True)
class Packer:
    """Draws everything that a micro-batch needs in addition to its pixels, from the positions of the samples."""

    rule: MaskRule
    grid: Grid  # rows and columns of patches
    seed: int
    global_batch: int  # number of images of a step, which the loss is averaged over
    depth: int  # number of layers of the context encoder
    drop_path: float = 0.0  # stochastic depth rate of its last layer
    budget: Budget | None = None  # what the batch is padded to

    def __call__(
        self, positions: Integers, pixels: torch.Tensor, indices: Sequence[int] = (), replaced: Sequence[str] = ()
    ) -> Batch:
        """Return the batch of the samples at `positions` (B,) with `pixels` (B, 3, H, W) uint8."""
        masks = draw_masks(self.rule, self.grid, self.seed, positions)
        keep = draw_drop_path(self.seed, positions, self.depth, self.drop_path)
        return pack(masks, pixels, self.global_batch, keep, positions, indices, replaced, self.budget)


def layer_rates(depth: int, drop_path: float) -> list[float]:
    """Return the probability of dropping each layer, linear from 0 to `drop_path` (arXiv 1603.09382, section 3)."""
    return [drop_path * layer / max(depth - 1, 1) for layer in range(depth)]


def draw_drop_path(seed: int, positions: npt.ArrayLike, depth: int, drop_path: float) -> Booleans | None:
    """Return (B, depth) bool, False where a layer is dropped for an image; None without stochastic depth."""
    if drop_path == 0:
        return None
    draw = uniform(random_bits(seed, Stream.DROP_PATH, positions, depth))
    return draw >= np.asarray(layer_rates(depth, drop_path))


def pack(
    masks: Masks,
    pixels: torch.Tensor,
    global_batch: int,
    keep: Booleans | None = None,
    positions: Sequence[int] | Integers = (),
    indices: Sequence[int] | Integers = (),
    replaced: Sequence[str] = (),
    budget: Budget | None = None,
) -> Batch:
    """Return the packed batch of B images, padded to `budget` if there is one.

    `keep` (B, layers) comes from `draw_drop_path`; `positions`, `indices` and `replaced` are fields of `Batch`.
    """
    context = _sequences(np.flatnonzero(masks.context), masks.context.sum(1))
    targets, block_image = _target_sequences(masks)
    weight = _loss_weight(targets, block_image, global_batch)
    if budget:
        images, most_blocks = len(masks.context), masks.targets.shape[0] * masks.targets.shape[1]
        # With stochastic depth the last context row has to be padding, because the padding of each layer reads and
        # writes that row.
        room = budget.room(len(context.index) + (keep is not None), budget.context)
        context = _pad(context, np.zeros(room - len(context.index), np.int64), budget.limit, images)
        room = budget.room(len(targets.index), budget.targets)
        targets = _pad(targets, np.zeros(room - len(targets.index), np.int64), budget.limit, most_blocks)
        weight = np.concatenate([weight, np.zeros(room - len(weight))])
    predictor, queries = _predictor_sequences(context, targets, block_image)
    if budget:
        predictor, queries = _pad_predictor(predictor, queries, len(targets.index), budget, most_blocks)
    return Batch(
        pixels=pixels,
        context=context,
        targets=targets,
        predictor=predictor,
        queries=queries,
        loss_weight=torch.from_numpy(weight.astype(np.float32)),
        drop_path_rows=() if keep is None else _drop_path_rows(keep, context, budget),
        positions=tuple(int(p) for p in positions),
        indices=tuple(int(i) for i in indices),
        replaced=tuple(replaced),
    )


def _target_sequences(masks: Masks) -> tuple[Sequences, Integers]:
    """Return the target blocks that were not removed, and the image (Q,) of each."""
    images, blocks, patches = masks.targets.shape
    lengths = masks.targets.sum(2).reshape(-1)  # (B, T, N) -> (B, T) -> (B * T,)
    block_image = np.repeat(np.arange(images), blocks)[lengths > 0]  # (Q,)
    block, patch = np.divmod(np.flatnonzero(masks.targets), patches)  # (Tt,) each; block counts over B * T
    return _sequences(block // blocks * patches + patch, lengths[lengths > 0]), block_image


def _loss_weight(targets: Sequences, block_image: Integers, global_batch: int) -> npt.NDArray[np.float64]:
    """Return the share of each target token in the loss, (Tt,)."""
    lengths = np.array(targets.lengths, dtype=np.int64)
    blocks_of_image = np.bincount(block_image)[block_image]  # (Q,)
    return np.repeat(1.0 / (lengths * blocks_of_image * global_batch), lengths)


def _predictor_sequences(context: Sequences, targets: Sequences, block_image: Integers) -> tuple[Sequences, Sequences]:
    """Return for each block its image's context tokens followed by its queries, and where the queries are."""
    context_lengths, block_lengths = (np.array(each.lengths, np.int64) for each in (context, targets))
    lengths = context_lengths[block_image] + block_lengths  # (Q,)
    block = np.repeat(np.arange(len(lengths)), lengths)  # (Tp,), the block of each token
    image = block_image[block]  # (Tp,)
    offset = np.arange(len(block)) - sequence_starts(lengths)[block]  # (Tp,), place within the sequence
    query = offset - context_lengths[image]  # (Tp,), place within the target block; negative for context tokens
    # Target rows follow all context rows, padding included.
    target_row = len(context.index) + sequence_starts(block_lengths)[block] + query
    row = np.where(query < 0, sequence_starts(context_lengths)[image] + offset, target_row)
    return _sequences(row, lengths), _sequences(np.flatnonzero(query >= 0), block_lengths)


def _pad_predictor(
    predictor: Sequences, queries: Sequences, asked: int, budget: Budget, most_blocks: int
) -> tuple[Sequences, Sequences]:
    """Pad the queries to `asked` tokens, as many as there are padded targets, and the predictor's sequences."""
    tokens, spare = len(predictor.index), asked - len(queries.index)
    # Each padding query needs a key, so the predictor has at least as much padding as the targets.
    room = budget.room(tokens + spare, budget.predictor)
    padded = _pad(predictor, np.zeros(room - tokens, np.int64), budget.limit, most_blocks)
    # Padding queries are the first padding tokens. Attention needs as many sequences of queries as of keys.
    count = len(padded.cu_seqlens) - 1
    return padded, _pad(queries, tokens + np.arange(spare), budget.limit, most_blocks, count)


def _drop_path_rows(keep: Booleans, context: Sequences, budget: Budget | None) -> tuple[Sequences | None, ...]:
    """Return for each layer of `keep` (B, layers) the context rows of the images that are kept."""
    lengths, rows = np.array(context.lengths, np.int64), len(context.index)
    layers: list[Sequences | None] = []
    for layer, images in enumerate(keep.T):
        room = budget.layers[layer] if budget else None
        if room is None and images.all():
            layers.append(None)
            continue
        chosen = np.repeat(images, lengths)  # (Tc,) bool
        sequences = _sequences(np.flatnonzero(chosen), lengths[images])
        if budget:
            count = int(chosen.sum())
            # A layer that keeps no image still runs, on padding.
            spare = min(budget.room(max(count, 1), room or 0), rows) - count
            sequences = _pad(sequences, np.full(spare, rows - 1), budget.limit, len(images))
        layers.append(sequences)
    return tuple(layers)


def _pad(sequences: Sequences, padding: Integers, limit: int, most: int, count: int | None = None) -> Sequences:
    """Append tokens that read the rows `padding`, in sequences of at most `limit`, then empty sequences.

    The number of sequences becomes `count`, else a number that depends on the number of tokens alone: the `most` that
    a batch can have, and as many as would hold all tokens if all were padding.
    """
    tokens = len(sequences.index) + len(padding)
    slots = (count or most + -(-tokens // limit)) - len(sequences.lengths)
    filled = (len(padding) - limit * np.arange(slots)).clip(0, limit)  # (slots,), e.g. limit, limit, rest, 0, 0
    lengths = np.concatenate([sequences.lengths, filled]).astype(np.int64)
    whole = _sequences(np.concatenate([sequences.index.numpy(), padding]), lengths)
    real = torch.arange(tokens) < len(sequences.index)
    return Sequences(whole.index, whole.cu_seqlens, sequences.lengths, limit, real)


def _sequences(index: Integers, lengths: Integers) -> Sequences:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = np.ascontiguousarray(index, dtype=np.int64)
    return Sequences(torch.from_numpy(rows), torch.from_numpy(ends), tuple(lengths.tolist()))


def sequence_starts(lengths: Integers) -> Integers:
    """Return where each packed sequence starts, (S,), given the lengths (S,)."""
    return np.cumsum(lengths) - lengths
