"""Mean and standard deviation of each feature channel, to bring features to mean 0 and standard deviation 1."""

import torch
from torch import Tensor

_ROWS = 16384
"""Rows that are converted to float64 at once."""


class RunningMeanStd:
    """Mean and standard deviation of each channel, in float64, over features that arrive in batches.

    Batches are merged by the update of Chan et al. ("Updating formulae and a pairwise algorithm for computing sample
    variances", 1979), so that no sum of squares of large numbers is needed.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean, self._square = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features (n, D) of any floating type."""
        for rows in features.split(_ROWS):
            mean = rows.mean(0, dtype=torch.float64)
            square = (rows.double() - mean).square().sum(0)
            before, self.count = self.count, self.count + len(rows)
            shift = mean - self._mean
            self._mean = self._mean + shift * (len(rows) / self.count)
            self._square = self._square + square + shift.square() * (before * len(rows) / self.count)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (D,) float64; the standard deviation of a constant channel is 1."""
        std = (self._square / self.count).sqrt()
        # Rounding leaves a small deviation in a constant channel; to divide by it would make noise of it.
        return self._mean, torch.where(std > 1e-7 * (1 + self._mean.abs()), std, 1.0)


def mean_and_std(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (D,) float32 of features (n, D), computed in float64.

    The standard deviation of a constant channel is 1, so that callers can divide by it.
    """
    running = RunningMeanStd()
    running.add(features)
    mean, std = running.mean_and_std()
    return mean.float(), std.float()
