"""From masks to the packed sequences of a batch: the last decisions, taken on the host, in numpy.

`Packer` is what a loader's worker calls: it draws the masks and the stochastic depth of the samples at given
positions and returns the finished `Batch`. It is picklable and holds numbers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ijepa.batch import Batch, Sequences
from ijepa.masks import MaskRule, Masks, draw_masks
from ijepa.randomness import Stream, uniform, words

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packer:
    """Draws everything a micro-batch needs beside its pixels, by the samples' positions.

    `depth` and `drop_path` are the context encoder's: layer l of L is dropped for an image with probability
    `drop_path * l / (L - 1)`, one draw for each image and layer (Huang et al., arXiv 1603.09382, section 3).
    """

    rule: MaskRule
    grid: tuple[int, int]
    seed: int
    global_batch: int
    depth: int
    drop_path: float = 0.0

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
        return pack(masks, pixels, self.global_batch, kept, positions, indices, replaced)


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
) -> Batch:
    """Pack masks (B images) and `kept` (B, layers) into a `Batch`; see there for every field's shape."""
    images, blocks, patches = masks.targets.shape
    context = np.flatnonzero(masks.context)
    context_lengths = masks.context.sum(1)

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
        len(context) + target_starts[sequence] + beyond,
    )
    blocks_of_image = np.bincount(block_image, minlength=images)
    weight = 1.0 / (block_lengths * blocks_of_image[block_image] * global_batch)
    return Batch(
        pixels=pixels,
        context=_sequences(context, context_lengths),
        targets=_sequences(targets, block_lengths),
        predictor=_sequences(row, lengths),
        queries=_sequences(np.flatnonzero(beyond >= 0), block_lengths),
        loss_weight=torch.from_numpy(np.repeat(weight, block_lengths).astype(np.float32)),
        kept=() if kept is None else tuple(_kept(column, context_lengths) for column in kept.T),
        positions=tuple(int(p) for p in positions),
        indices=tuple(int(i) for i in indices),
        replaced=tuple(replaced),
    )


def _kept(images: npt.NDArray[np.bool_], lengths: Integers) -> Sequences | None:
    if images.all():
        return None
    return _sequences(np.flatnonzero(np.repeat(images, lengths)), lengths[images])


def _sequences(index: Integers, lengths: Integers) -> Sequences:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Sequences(
        torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64)),
        torch.from_numpy(ends),
        tuple(lengths.tolist()),
    )


def _starts(lengths: Integers) -> Integers:
    return np.cumsum(lengths) - lengths
