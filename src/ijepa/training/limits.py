"""When a run stops because of its data or its gradients: too many unreadable images, or void steps in a row.

All decisions use the counts of all ranks, so all ranks stop after the same step.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, lgamma, log, log1p, pi
from typing import Any

import numpy as np

from ijepa.config.recipe import Recipe
from ijepa.data.loading.shuffle import Order
from ijepa.data.sources.base import Source
from ijepa.distributed.process_group import World
from ijepa.masking.batch import Batch
from ijepa.utils.errors import RunError

_LOG = logging.getLogger(__name__)
_MOST_NAMES = 100

RISK = 1e-6
"""Largest probability that a run ever stops on a sample although the share of unreadable images is within the limit."""


@dataclass
class Counts:
    """Counts of a run that every checkpoint saves. The names are this rank's, the numbers are of all ranks."""

    replaced: int = 0
    """Crops of unreadable images."""
    seen: int = 0
    """Crops so far."""
    void_in_a_row: int = 0
    replaced_names: list[str] = field(default_factory=list)


class FailureLimits:
    """Counts unreadable images and void steps, names them, and stops the run when there are too many."""

    def __init__(self, recipe: Recipe, source: Source, order: Order, world: World, counts: Counts) -> None:
        self._recipe, self._source, self._order, self._world = recipe, source, order, world
        self._counts = counts
        self._named = set(counts.replaced_names)  # all names, while the counts keep the first hundred

    def state(self) -> dict[str, Any]:
        """Return the counts with the names of all ranks, for a checkpoint. Every rank calls it."""
        names = dict.fromkeys(
            name for rank in self._world.all_gather_object(self._counts.replaced_names) for name in rank
        )
        return {**vars(self._counts), "replaced_names": list(names)[:_MOST_NAMES]}

    def count_replaced(self, batch: Batch) -> int:
        """Log the names of a batch's unreadable images, and return how many of its crops show a replacement."""
        if not batch.replaced:
            return 0
        new = [name for name in dict.fromkeys(batch.replaced) if name not in self._named]
        self._named.update(new)
        self._counts.replaced_names += new[: max(0, _MOST_NAMES - len(self._counts.replaced_names))]
        for name in new:
            _LOG.info("unreadable image, replaced by the next image of its epoch: %s", name)
        places = np.array(batch.positions) // self._recipe.data.crops_per_decode
        return int((self._order.indices(places) != np.array(batch.indices)).sum())

    def check(self, rows: Sequence[dict[str, Any]]) -> None:
        """Count the metrics of steps. Every rank calls it with the same rows.

        Raises:
            RunError: too many void steps in a row, or too many unreadable images.
        """
        for row in rows:
            self._check_images(row)
            self._check_void(row)

    def _check_images(self, row: dict[str, Any]) -> None:
        counts, data = self._counts, self._recipe.data
        counts.seen += self._recipe.batch.total
        if "replaced" not in row:
            return
        counts.replaced += row["replaced"]
        bad, seen = (count // data.crops_per_decode for count in (counts.replaced, counts.seen))
        if too_many(bad, seen, len(self._source), data.replaced_limit, shuffled=data.order == "global"):
            names = self.state()["replaced_names"]
            raise RunError(
                f"{bad} of {seen} images are unreadable, more than data.replaced_limit = {data.replaced_limit}; "
                f"the first: {', '.join(names[:5])}"
            )

    def _check_void(self, row: dict[str, Any]) -> None:
        counts, crops = self._counts, self._recipe.data.crops_per_decode
        counts.void_in_a_row = counts.void_in_a_row + 1 if row.get("void") else 0
        if counts.void_in_a_row <= self._recipe.optimizer.nonfinite_limit:
            return
        whole = self._recipe.batch.total
        places = range((row["step"] - 1) * whole // crops, row["step"] * whole // crops)  # crops divide a batch
        indices = list(dict.fromkeys(self._order.indices(places).tolist()))
        names = ", ".join(self._source.name(index) for index in indices[:8])
        more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
        raise RunError(
            f"{counts.void_in_a_row} steps in a row had a non-finite gradient (each was void), the last is "
            f"step {row['step']} with {names}{more}; lower the learning rates or set --precision.autocast none, "
            f"which needs a new --output"
        )


def too_many(bad: int, seen: int, images: int, limit: float, *, shuffled: bool) -> bool:
    """Whether the share of unreadable images is above `limit`.

    The share among the images seen so far exceeds any limit now and then by chance, and a test after every step makes
    that more likely. So a run stops for one of two reasons:

    * It is certain: more images were unreadable than the limit allows in as many passes over the data as have begun,
      even if every image still to come is readable.
    * The images seen are a random sample, and their counts exclude a share within the limit. The evidence is the
      likelihood ratio of the counts between a mixture of all shares (Jeffreys' prior) and the limit. By Ville's
      inequality, if the share is within the limit, the ratio ever exceeds 1 / `RISK` with probability `RISK` at most,
      however often it is tested.

    Args:
        bad: how many of the images seen were unreadable.
        seen: images seen since the run began, over all ranks.
        images: size of the data set; each pass sees every image once.
        limit: the largest share that is allowed, in [0, 1]. Unless it is 0, one unreadable image is within it, however
            small the data set.
        shuffled: whether each pass is a random permutation of all images, so that those seen are a random sample.
    """
    if limit > 0:
        limit = max(limit, 1 / images)
    allowed = limit * images * ceil(seen / images)
    if bad > allowed * (1 + 1e-12):  # the limit itself, when rounded, must not count as above it
        return True
    if not shuffled or not 0 < limit < 1 or bad <= limit * seen:
        return False
    good = seen - bad
    mixture = lgamma(bad + 0.5) + lgamma(good + 0.5) - lgamma(seen + 1) - log(pi)
    return mixture - bad * log(limit) - good * log1p(-limit) > -log(RISK)
