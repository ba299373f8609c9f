"""Multi-block masks: which patches are context, which are targets (I-JEPA, arXiv 2301.08243, section 3 and A.1).

For each image, four target blocks and one context block are drawn, each with its own area and aspect ratio,
independent of one another and of every other image; the context then loses all target patches.

* A block of area share s and aspect a on an H x W grid is `round(H sqrt(s a))` by `round(W sqrt(s / a))` patches,
  at least 1 and at most the grid. On a square grid a is height over width; on an oblong one it is measured
  against the image's own shape, so that the area share holds there too. The continuous draw never leaves its
  bounds; rounding does, for about a tenth of blocks at 14 x 14.
* Its corner is uniform over every place where it fits, so every patch, the last row and column included, can be
  context and target.
* No sequence is cut to the length of another: lengths differ, and the model takes them packed.
* The context is never shorter than `min_context` patches and never holds a target patch. An image whose draw
  breaks that is drawn again, up to `ATTEMPTS` times; after that its last target blocks are given up, one by one,
  until the context is long enough. One block always fits: `MaskRule.check_grid` refuses grids where it could not.

Everything is vectorised over images: membership is four comparisons on (images, blocks, H) and (images, blocks, W).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ijepa.utils.config import BaseConfig, Ratios, Shares
from ijepa.utils.errors import UserError
from ijepa.utils.random import Stream, Words, below, uniform, words

ATTEMPTS = 16
_WORDS_PER_BLOCK = 4  # area, aspect, row, column
_TOLERANCE = 0.1  # how far a whole-number block may leave the rule's bounds for a grid to count as usable

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


class MaskRule(BaseConfig):
    """How context and target blocks are drawn. Areas are shares of the image, aspect ratios are height over width."""

    targets: int = Field(4, ge=1, le=16)
    """Number of target blocks per image."""
    target_scale: Shares = (0.15, 0.2)
    """Area of a target block, as a share of the image area."""
    target_aspect: Ratios = (0.75, 1.5)
    """Aspect ratio of a target block, height over width."""
    context_scale: Shares = (0.85, 1.0)
    """Area of the context block before target patches are removed, as a share of the image area."""
    context_aspect: Ratios = (1.0, 1.0)
    """Aspect ratio of the context block, height over width."""
    min_context: int = Field(10, ge=1)
    """Minimum number of context patches per image."""

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse a grid on which the rule cannot be kept.

        Raises:
            UserError: when no block of whole patches comes near the rule's area and aspect, or when one target
                block could leave fewer than `min_context` patches of context.
        """
        height, width = grid
        rows, columns = np.mgrid[1 : height + 1, 1 : width + 1]
        area = rows * columns / (height * width)
        aspect = (rows / height) / (columns / width)
        near = np.ones_like(area, dtype=bool)
        for share, (low, high) in ((area, self.target_scale), (aspect, self.target_aspect)):
            near &= (share >= low * (1 - _TOLERANCE)) & (share <= high * (1 + _TOLERANCE))
        if not near.any():
            raise UserError(
                f"mask.target_scale = {self.target_scale[0]},{self.target_scale[1]}",
                f"no block of whole patches has that area and aspect on a {height}x{width} grid",
                "use a smaller patch_size or a larger image_size",
            )
        largest_target = _largest(self.target_scale, self.target_aspect, grid)
        smallest_context = _smallest(self.context_scale, self.context_aspect, grid)
        if smallest_context - largest_target < self.min_context:
            raise UserError(
                f"mask.min_context = {self.min_context}",
                f"on a {height}x{width} grid a context block of {smallest_context} patches loses up to "
                f"{largest_target} to one target",
                f"at most {max(smallest_context - largest_target, 0)} is possible",
            )


@dataclass(frozen=True)
class Masks:
    """Masks of B images on a grid of N patches, as booleans.

    Attributes:
        context: (B, N), True where a patch is context.
        targets: (B, T, N), True where a patch belongs to a target block; all False for a block given up.
        grid: rows and columns of patches; N is their product and patches count row by row.
    """

    context: Booleans
    targets: Booleans
    grid: tuple[int, int]


def draw_masks(rule: MaskRule, grid: tuple[int, int], seed: int, positions: npt.ArrayLike) -> Masks:
    """Draw the masks of the samples at `positions` (B,) of the run with this seed.

    Each image's mask depends on its own position alone. The rule must have passed `check_grid`.
    """
    place = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    context, targets = _attempt(rule, grid, seed, place, attempt=0)
    for attempt in range(1, ATTEMPTS):
        short = np.flatnonzero(context.sum(1) < rule.min_context)
        if not len(short):
            break
        context[short], targets[short] = _attempt(rule, grid, seed, place[short], attempt)
    for image in np.flatnonzero(context.sum(1) < rule.min_context):
        _give_up_targets(rule, grid, seed, place[image], context[image], targets[image])
    return Masks(context, targets, grid)


def block_sizes(
    area: Words, aspect: Words, scale: Shares, ratio: Ratios, grid: tuple[int, int]
) -> tuple[Integers, Integers]:
    """Turn random words into whole block heights and widths, by the rounding stated above."""
    high, wide = _continuous(area, aspect, scale, ratio, grid)
    return _round(high, grid[0]), _round(wide, grid[1])


def _continuous(
    area: Words, aspect: Words, scale: Shares, ratio: Ratios, grid: tuple[int, int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    share = scale[0] + (scale[1] - scale[0]) * uniform(area)
    shape = ratio[0] + (ratio[1] - ratio[0]) * uniform(aspect)
    return grid[0] * np.sqrt(share * shape), grid[1] * np.sqrt(share / shape)


def _round(length: npt.NDArray[np.float64], limit: int) -> Integers:
    return np.clip(np.rint(length).astype(np.int64), 1, limit)


def _blocks(draw: Words, scale: Shares, ratio: Ratios, grid: tuple[int, int]) -> Booleans:
    """Draw blocks from words (..., 4) as membership (..., H, W)."""
    high, wide = block_sizes(draw[..., 0], draw[..., 1], scale, ratio, grid)
    top, left = below(draw[..., 2], grid[0] - high + 1), below(draw[..., 3], grid[1] - wide + 1)
    row, column = np.arange(grid[0]), np.arange(grid[1])
    rows = (row >= top[..., None]) & (row < (top + high)[..., None])
    columns = (column >= left[..., None]) & (column < (left + wide)[..., None])
    return rows[..., :, None] & columns[..., None, :]


def _attempt(
    rule: MaskRule, grid: tuple[int, int], seed: int, positions: Integers, attempt: int
) -> tuple[Booleans, Booleans]:
    count = _WORDS_PER_BLOCK * (1 + rule.targets)
    draw = words(seed, Stream.MASK, positions, count, skip=attempt * count)
    draw = draw.reshape(len(positions), 1 + rule.targets, _WORDS_PER_BLOCK)
    targets = _blocks(draw[:, 1:], rule.target_scale, rule.target_aspect, grid).reshape(
        len(positions), rule.targets, -1
    )
    block = _blocks(draw[:, 0], rule.context_scale, rule.context_aspect, grid).reshape(len(positions), -1)
    return block & ~targets.any(1), targets


def _give_up_targets(
    rule: MaskRule, grid: tuple[int, int], seed: int, position: int, context: Booleans, targets: Booleans
) -> None:
    """Drop an image's last target blocks, in place, until its context is long enough."""
    count = _WORDS_PER_BLOCK * (1 + rule.targets)
    draw = words(seed, Stream.MASK, [position], count, skip=(ATTEMPTS - 1) * count)[0, :_WORDS_PER_BLOCK]
    block = _blocks(draw, rule.context_scale, rule.context_aspect, grid).reshape(-1)
    for last in range(rule.targets - 1, 0, -1):
        targets[last] = False
        context[:] = block & ~targets.any(0)
        if context.sum() >= rule.min_context:
            return


def _largest(scale: Shares, ratio: Ratios, grid: tuple[int, int]) -> int:
    return max(_corner_areas(scale[1], ratio, grid))


def _smallest(scale: Shares, ratio: Ratios, grid: tuple[int, int]) -> int:
    return min(_corner_areas(scale[0], ratio, grid))


def _corner_areas(share: float, ratio: Ratios, grid: tuple[int, int]) -> list[int]:
    """Whole areas of blocks of one area share, over a fine sweep of the aspect's range."""
    shape = np.linspace(ratio[0], ratio[1], 257)
    high = _round(grid[0] * np.sqrt(share * shape), grid[0])
    return [int(area) for area in high * _round(grid[1] * np.sqrt(share / shape), grid[1])]
