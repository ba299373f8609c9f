"""Multi-block masks: which patches are context and which are targets (I-JEPA, arXiv 2301.08243, section 3 and A.1).

Four target blocks and one context block are drawn for each image, each with its own area and aspect ratio, independent
of each other and of all other images. All target patches are then removed from the context.

* A block of area share s and aspect ratio a on an H x W grid has `round(H sqrt(s a))` by `round(W sqrt(s / a))`
  patches, at least 1 and at most the grid. On a square grid a is height over width. On an oblong grid a is relative to
  the image's own shape, so that the area share holds there too. The values before rounding stay within the bounds of
  the rule; rounding exceeds them for about a tenth of the blocks at 14 x 14.
* The corner of a block is uniform over all places where the block fits, so every patch, including the last row and
  column, can be context and target.
* No sequence is cut to the length of another one: the model takes packed sequences of different lengths.
* The context has at least `min_context` patches and no target patch. An image whose draw violates this is drawn again,
  up to `ATTEMPTS` times. After that its last target blocks are removed, one by one, until the context is long enough.
  One block always fits if the caller has checked that `smallest_context - largest_target >= min_context`.

Everything is vectorized over images.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ijepa.utils.random import Stream, Words, randint, random_bits, uniform

ATTEMPTS = 16
_WORDS_PER_BLOCK = 4  # area, aspect ratio, row, column
_TOLERANCE = 0.1  # relative error of area and aspect ratio at which a block of whole patches still counts as usable

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
Interval = tuple[float, float]
Grid = tuple[int, int]


@dataclass(frozen=True)
class MaskRule:
    """How blocks are drawn. Areas are shares of the image area, aspect ratios are height over width."""

    targets: int = 4  # number of target blocks per image
    target_scale: Interval = (0.15, 0.2)  # area of a target block
    target_aspect: Interval = (0.75, 1.5)  # aspect ratio of a target block
    context_scale: Interval = (0.85, 1.0)  # area of the context block, before target patches are removed
    context_aspect: Interval = (1.0, 1.0)  # aspect ratio of the context block
    min_context: int = 10  # smallest number of context patches per image

    def has_target_block(self, grid: Grid) -> bool:
        """Return whether a block of whole patches has about the area and aspect ratio of a target block."""
        height, width = grid
        rows, columns = np.mgrid[1 : height + 1, 1 : width + 1]  # every possible block, (H, W) each
        area = rows * columns / (height * width)
        aspect = (rows / height) / (columns / width)
        usable = np.ones_like(area, dtype=bool)
        for value, (low, high) in ((area, self.target_scale), (aspect, self.target_aspect)):
            usable &= (value >= low * (1 - _TOLERANCE)) & (value <= high * (1 + _TOLERANCE))
        return bool(usable.any())

    def largest_target(self, grid: Grid) -> int:
        """Return the number of patches of the largest possible target block."""
        return int(_areas(self.target_scale[1], self.target_aspect, grid).max())

    def smallest_context(self, grid: Grid) -> int:
        """Return the number of patches of the smallest possible context block, before target patches are removed."""
        return int(_areas(self.context_scale[0], self.context_aspect, grid).min())


@dataclass(frozen=True)
class Masks:
    """Masks of B images with T target blocks each, on a grid of N patches that are numbered row by row."""

    context: Booleans  # (B, N), True where a patch is context
    targets: Booleans  # (B, T, N), True where a patch belongs to a target block; all False for a removed block
    grid: Grid  # rows and columns of patches


def draw_masks(rule: MaskRule, grid: Grid, seed: int, positions: npt.ArrayLike) -> Masks:
    """Draw the masks of the samples at `positions` (B,) of the run with this seed.

    The masks of an image depend on the seed and on its own position alone.
    """
    place = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    context, targets = _attempt(rule, grid, seed, place, attempt=0)
    for attempt in range(1, ATTEMPTS):
        short = np.flatnonzero(context.sum(1) < rule.min_context)
        if not len(short):
            break
        context[short], targets[short] = _attempt(rule, grid, seed, place[short], attempt)
    for image in np.flatnonzero(context.sum(1) < rule.min_context):
        _remove_targets(rule, grid, seed, place[image], context[image], targets[image])
    return Masks(context, targets, grid)


def block_sizes(area: Words, aspect: Words, scale: Interval, ratio: Interval, grid: Grid) -> tuple[Integers, Integers]:
    """Return the heights and widths of blocks in whole patches, each of the shape of the random words `area`."""
    share = scale[0] + (scale[1] - scale[0]) * uniform(area)
    shape = ratio[0] + (ratio[1] - ratio[0]) * uniform(aspect)
    return _whole(grid[0] * np.sqrt(share * shape), grid[0]), _whole(grid[1] * np.sqrt(share / shape), grid[1])


def _whole(length: npt.NDArray[np.float64], limit: int) -> Integers:
    return np.clip(np.rint(length).astype(np.int64), 1, limit)


def _areas(share: float, ratio: Interval, grid: Grid) -> Integers:
    """Areas in whole patches (257,) of blocks of one area share, over a fine sweep of the aspect ratios."""
    shape = np.linspace(ratio[0], ratio[1], 257)
    return _whole(grid[0] * np.sqrt(share * shape), grid[0]) * _whole(grid[1] * np.sqrt(share / shape), grid[1])


def _blocks(draw: Words, scale: Interval, ratio: Interval, grid: Grid) -> Booleans:
    """Draw blocks from random words (..., 4): (..., N), True inside the block."""
    height, width = block_sizes(draw[..., 0], draw[..., 1], scale, ratio, grid)
    top, left = randint(draw[..., 2], grid[0] - height + 1), randint(draw[..., 3], grid[1] - width + 1)
    row, column = np.arange(grid[0]), np.arange(grid[1])
    rows = (row >= top[..., None]) & (row < (top + height)[..., None])  # (..., H)
    columns = (column >= left[..., None]) & (column < (left + width)[..., None])  # (..., W)
    inside = rows[..., :, None] & columns[..., None, :]  # (..., H, W)
    return inside.reshape(*draw.shape[:-1], -1)


def _draw(rule: MaskRule, seed: int, positions: Integers, attempt: int) -> Words:
    """Random words (B, 1 + T, 4) of an attempt: the context block's, then each target block's."""
    blocks = 1 + rule.targets
    count = blocks * _WORDS_PER_BLOCK
    draw = random_bits(seed, Stream.MASK, positions, count, skip=attempt * count)  # (B, (1 + T) * 4)
    return draw.reshape(len(positions), blocks, _WORDS_PER_BLOCK)


def _attempt(rule: MaskRule, grid: Grid, seed: int, positions: Integers, attempt: int) -> tuple[Booleans, Booleans]:
    """Context (B, N), and target blocks (B, T, N)."""
    draw = _draw(rule, seed, positions, attempt)
    targets = _blocks(draw[:, 1:], rule.target_scale, rule.target_aspect, grid)
    block = _blocks(draw[:, 0], rule.context_scale, rule.context_aspect, grid)
    return block & ~targets.any(1), targets


def _remove_targets(rule: MaskRule, grid: Grid, seed: int, position: int, context: Booleans, targets: Booleans) -> None:
    """Remove the last target blocks of an image, in place, until its context is long enough."""
    draw = _draw(rule, seed, np.array([position]), ATTEMPTS - 1)  # the last attempt's words, (1, 1 + T, 4)
    block = _blocks(draw[0, 0], rule.context_scale, rule.context_aspect, grid)  # (N,)
    for last in range(rule.targets - 1, 0, -1):
        targets[last] = False
        context[:] = block & ~targets.any(0)
        if context.sum() >= rule.min_context:
            return
