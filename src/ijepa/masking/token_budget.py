"""How many tokens a micro-batch has room for, so that its shapes do not change from step to step.

Masks and stochastic depth give every batch another number of tokens, and every number another shape: to compile for,
to plan memory for, to align. A budget is the mean number over masks and `deviations` standard deviations more, rounded
up to a multiple of `granule`. What is left over is filled with padding, which stands in sequences of its own, so that
no image's token attends to it, and whose outputs weigh nothing. Only a float8 scale of a whole tensor can see it: see
`ijepa.model.vision_transformer`. A batch that needs more than the budget gets it: room
grows by sixteenths of the budget, so overflow costs a second shape and loses nothing. A budget of 0 only aligns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from ijepa.masking.masks import MaskRule, draw_masks

GRANULE = 128
"""Tokens that budgets are multiples of: float8 needs 16, matrix units work in tiles of 128."""
_SAMPLES = 4096


@dataclass(frozen=True)
class Budget:
    """Tokens a micro-batch is padded to.

    Attributes:
        context: in the context encoder.
        targets: in all target blocks.
        predictor: in the predictor's sequences.
        layers: in each context encoder layer after stochastic depth; None for a layer that drops nothing.
        limit: the longest sequence there can be; no padding sequence is longer either.
        granule: what every number of tokens is a multiple of.
    """

    context: int
    targets: int
    predictor: int
    layers: tuple[int | None, ...]
    limit: int
    granule: int = GRANULE

    @classmethod
    def for_masks(
        cls,
        rule: MaskRule,
        grid: tuple[int, int],
        micro: int,
        rates: Sequence[float],
        *,
        deviations: float = 3.0,
        granule: int = GRANULE,
    ) -> Self:
        """Measure the budget of `micro` images on masks drawn for it; `rates` is stochastic depth's, by layer.

        Images are independent, so the deviation of their sum grows with its root. With 3 deviations one batch in 700
        overflows in its context or in its predictor, and as many in each layer.
        """
        masks = draw_masks(rule, grid, 0, np.arange(_SAMPLES))
        seen, asked = masks.context.sum(1), masks.targets.sum((1, 2))
        guessed = seen * masks.targets.any(2).sum(1) + asked
        patches, blocks = grid[0] * grid[1], masks.targets.shape[1]

        def room(mean: float, square: float, most: int) -> int:
            tokens = micro * mean + deviations * (micro * max(square - mean**2, 0)) ** 0.5
            return -(-min(int(tokens) + 1, micro * most) // granule) * granule

        def measured(each: np.ndarray, most: int) -> int:
            return room(float(each.mean()), float((each.astype(float) ** 2).mean()), most)

        context = measured(seen, patches)
        mean, square = float(seen.mean()), float((seen.astype(float) ** 2).mean())
        layers = [
            min(room((1 - rate) * mean, (1 - rate) * square, patches), context) if rate else None for rate in rates
        ]
        return cls(
            context,
            measured(asked, patches * blocks),
            measured(guessed, patches * blocks),
            tuple(layers),
            patches,
            granule,
        )

    @classmethod
    def aligned(cls, grid: tuple[int, int], rates: Sequence[float], granule: int) -> Self:
        """Only round every number of tokens up to a multiple of `granule`."""
        return cls(0, 0, 0, tuple(0 if rate else None for rate in rates), grid[0] * grid[1], granule)

    def room(self, tokens: int, budget: int) -> int:
        """Return what `tokens` are padded to: `budget`, or the first step above it that holds them."""
        if tokens <= budget:
            return budget
        step = max(budget // 16 // self.granule, 1) * self.granule
        return budget + -(-(tokens - budget) // step) * step
