"""Token budgets: padding micro-batches to a constant number of tokens, so that tensor shapes are constant.

Masks and stochastic depth make the number of tokens differ between batches. Constant shapes avoid recompilation, make
memory predictable and align matrix products. A budget is the mean number of tokens over random masks plus some standard
deviations, rounded up to a multiple of `granule`. The rest is filled with padding in sequences of its own, so that no
token of an image attends to padding, and padding has no weight in the loss. Only a float8 scale of a whole tensor can
depend on padding, see `ijepa.model.vision_transformer`.

A batch that needs more than the budget gets more: the number of tokens grows in steps of a sixteenth of the budget, so
an overflow costs a second shape and loses nothing. A budget of 0 rounds to `granule` and does nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from ijepa.masking.masks import Grid, MaskRule, draw_masks

GRANULE = 128
"""Budgets are multiples of this number of tokens: float8 needs 16, and matrix units work in tiles of 128."""
_SAMPLES = 4096


@dataclass(frozen=True)
class Budget:
    """Numbers of tokens that a micro-batch is padded to."""

    context: int  # in the context encoder
    targets: int  # in all target blocks
    predictor: int  # in the sequences of the predictor
    layers: tuple[
        int | None, ...
    ]  # in each layer of the context encoder with stochastic depth; None if it drops nothing
    limit: int  # length of the longest possible sequence, and of the longest padding sequence
    granule: int = GRANULE  # all numbers of tokens are multiples of this

    @classmethod
    def for_masks(
        cls,
        rule: MaskRule,
        grid: Grid,
        micro: int,
        rates: Sequence[float],
        *,
        deviations: float = 3.0,
        granule: int = GRANULE,
    ) -> Self:
        """Measure the budget on masks that are drawn for it.

        Images are independent, so the standard deviation of their sum grows with the square root of their number. With
        3 deviations, one batch in 700 overflows in the context, one in the predictor, and one in each layer.

        Args:
            rule: how masks are drawn.
            grid: rows and columns of patches.
            micro: number of images in a micro-batch.
            rates: stochastic depth rate of each layer.
            deviations: number of standard deviations above the mean.
            granule: see `Budget`.
        """
        masks = draw_masks(rule, grid, 0, np.arange(_SAMPLES))
        context, targets = masks.context.sum(1), masks.targets.sum((1, 2))  # tokens of each image, (_SAMPLES,)
        predictor = context * masks.targets.any(2).sum(1) + targets  # each block reads the whole context
        patches, blocks = grid[0] * grid[1], masks.targets.shape[1]

        def room(each: np.ndarray, most: int, kept: float = 1.0) -> int:
            """Tokens for `micro` images of `each` tokens, at most `most`, each image kept with probability `kept`."""
            mean, square = kept * float(each.mean()), kept * float((each.astype(float) ** 2).mean())
            tokens = micro * mean + deviations * (micro * max(square - mean**2, 0)) ** 0.5
            return -(-min(int(tokens) + 1, micro * most) // granule) * granule

        whole = room(context, patches)
        layers = [min(room(context, patches, 1 - rate), whole) if rate else None for rate in rates]
        most = patches * blocks
        return cls(whole, room(targets, most), room(predictor, most), tuple(layers), patches, granule)

    @classmethod
    def aligned(cls, grid: Grid, rates: Sequence[float], granule: int) -> Self:
        """Return a budget that only rounds every number of tokens up to a multiple of `granule`."""
        return cls(0, 0, 0, tuple(0 if rate else None for rate in rates), grid[0] * grid[1], granule)

    def room(self, tokens: int, budget: int) -> int:
        """Return the number that `tokens` are padded to: `budget`, or the first step above it that holds them."""
        if tokens <= budget:
            return budget
        step = max(budget // 16 // self.granule, 1) * self.granule
        return budget + -(-(tokens - budget) // step) * step
