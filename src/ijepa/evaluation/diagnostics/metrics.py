"""Quality of features without labels: rank, spread, and the share that position alone explains.

Functions take features (n, D) of images or (n, N, D) of patches and compute in float64, because the results are small
differences of large sums. `Moments` reads patch features in batches and keeps one pooled vector per image and one sum
per position, so that features of many images are never in memory together.

None of these numbers is a score: each shows one way in which self-supervised features fail.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ijepa.data.sources.base import Source
from ijepa.evaluation.features.extract import PatchEncoder, require_finite
from ijepa.evaluation.features.sampling import choose, crops, encoded, pair
from ijepa.utils.errors import UserError

RANKME_EPS = 1e-7
BATCH = 64
"""Images per forward pass."""


def entropy_rank(values: Tensor, eps: float) -> float:
    """Return e to the entropy of non-negative `values` (k,) normalized to sum 1; `eps` keeps the logarithm finite."""
    p = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + eps
    return float(torch.exp(-(p * p.log()).sum()))


def rankme(features: Tensor, *, centered: bool = False) -> float:
    """Return the effective rank of features (n, D): e to the entropy of their normalized singular values.

    RankMe, Garrido et al., arXiv 2210.02885, equation 1. There the features are not centered, so that a large common
    mean counts as one dominant direction; `centered` subtracts it first. The result is at most min(n, D). Compare
    encoders only at equal n.
    """
    wide = features.double()
    if centered:
        wide = wide - wide.mean(0)
    return entropy_rank(torch.linalg.svdvals(wide), RANKME_EPS)


def alpha_req(features: Tensor, *, first: int = 1, last: int | None = None) -> float:
    """Return alpha of the eigenvalues l_j ~ j^-alpha of the covariance of features (n, D), j = first..last.

    alpha-ReQ, Agrawal et al., NeurIPS 2022: least squares on logarithms. In the paper good features have about 1; far
    above it, few directions have all variance. `nan` if fewer than two eigenvalues are left.
    """
    wide = features.double()
    values = torch.linalg.svdvals(wide - wide.mean(0)).square()
    # Eigenvalues that are this small are rounding errors; their logarithms would dominate the fit.
    values = values[values > 1e-10 * values.amax()] if float(values.amax()) > 0 else values[:0]
    rank = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    x, y = rank[first - 1 : last].log(), values[first - 1 : last].log()
    if len(x) < 2:
        return float("nan")
    x = x - x.mean()
    return -float((x * (y - y.mean())).sum() / x.square().sum())


def feature_std(features: Tensor) -> float:
    """Return the standard deviation of each channel of features (n, D), mean over channels."""
    return float(features.double().std(0, correction=0).mean())


def mean_cosine(features: Tensor) -> float:
    """Return the mean cosine between two different rows of features (n, D); 1 for a single row."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    n = len(unit)
    # The squared length of the sum is the sum of all n^2 products; n of them are those of a row with itself.
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))) if n > 1 else 1.0


def leave_one_out_knn(features: Tensor, labels: Tensor, k: int = 10, temperature: float = 0.07) -> float:
    """Return the accuracy of leave-one-out kNN on features (n, D): cosine similarity s, votes exp(s / temperature).

    `labels` (n,) are any integers: memory depends on the number of different ones, not on the largest.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)  # an image is not its own neighbor
    near, index = similarity.topk(min(k, len(unit) - 1), dim=1)
    present, labels = labels.unique(return_inverse=True)
    votes = unit.new_zeros(len(unit), len(present))
    votes.scatter_add_(1, labels[index], ((near - 1) / temperature).exp())
    return float((votes.argmax(1) == labels).double().mean())


class Moments:
    """Running sums over batches of patch features (B, N, D); all properties are those of all batches so far."""

    def __init__(self) -> None:
        self._pooled: list[Tensor] = []
        self._position_sum: Tensor | None = None
        self._square = self._length = self._distance = 0.0

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Return the moments of one batch."""
        moments = cls()
        moments.add(features)
        return moments

    def add(self, features: Tensor) -> None:
        """Add a batch (B, N, D).

        Raises:
            RunError: features that are not finite numbers.
        """
        wide = require_finite(features).double()
        mean = wide.mean(1)
        total = wide.sum(0)
        self._pooled.append(mean)
        self._position_sum = total if self._position_sum is None else self._position_sum + total
        self._square += float(wide.square().sum())
        self._length += float(wide.norm(dim=2).sum())
        self._distance += float((wide - mean[:, None]).norm(dim=2).sum())

    @property
    def pooled(self) -> Tensor:
        """Mean over the patches of each image, (n, D) float64."""
        return torch.cat(self._pooled)

    @property
    def position_r2(self) -> float:
        """Share of the variance of patch features that the mean of each position explains, in [0, 1]."""
        images, sums = len(self.pooled), self._sums
        # Sums of squares: of the common mean, between positions, and in total, the last two around the common mean.
        common = images * len(sums) * float(sums.mean(0).square().sum()) / images**2
        between, total = float(sums.square().sum()) / images - common, self._square - common
        return min(1.0, max(0.0, between / total)) if total > 1e-12 * self._square else 0.0

    @property
    def patch_spread(self) -> float:
        """Mean distance of a patch from the mean patch of its image, relative to the mean length of a patch."""
        return self._distance / self._length if self._length else 0.0

    @property
    def rms(self) -> float:
        """Root mean square of all patch features."""
        return float((self._square / (len(self.pooled) * self._sums.numel())) ** 0.5)

    @property
    def _sums(self) -> Tensor:
        """Sum of the features of each position, (N, D)."""
        if self._position_sum is None:
            raise ValueError("no features yet")
        return self._position_sum


def feature_metrics(moments: Moments) -> dict[str, float]:
    """Return the metrics that are cheap enough to compute during training."""
    pooled = moments.pooled
    return {
        "rankme": rankme(pooled),
        "rankme_centred": rankme(pooled, centered=True),
        "std": feature_std(pooled),
        "position_r2": moments.position_r2,
        "mean_cosine": mean_cosine(pooled),
        "alpha_req": alpha_req(pooled),
        "patch_spread": moments.patch_spread,
    }


@dataclass(frozen=True)
class Health:
    """Input of the verdict. Standard deviations are relative to the root mean square of the features.

    `std_before_norm` and `lidar` are None if they were not measured.
    """

    images: int
    width: int
    rankme_centred: float
    relative_std: float
    position_r2: float
    patch_spread: float
    std_before_norm: float | None = None
    lidar: float | None = None

    @property
    def attainable(self) -> int:
        """The largest centered rank that is possible with this number of images."""
        return max(1, min(self.images - 1, self.width))


CONSTANT = 0.01
"""Pooled features whose relative standard deviation is below this do not depend on the image."""
FLAT = 0.05
"""Patches with a spread below this do not depend on the place in the image."""
NARROW = 0.02
"""A centered RankMe below this share of the attainable one is suspicious."""
POSITIONAL = 0.7
"""If position explains more than this share of the variance, features are mostly the position embedding."""

_RESTART = (
    "lower optimizer.lr_encoder, raise schedule.momentum_start or lengthen schedule.warmup, and start again from "
    "before the collapse"
)


def verdict(health: Health) -> str:
    """Return one sentence that begins with "collapsed", "watch" or "healthy", with numbers and what to change.

    "collapsed" is a state from which training does not recover: features are constant, or have one direction. All else
    also occurs temporarily in healthy runs, so it is "watch".
    """
    rank = f"centered RankMe {health.rankme_centred:.1f} of {health.attainable} attainable"
    if health.relative_std < CONSTANT:
        return (
            "collapsed: all images have nearly the same features, their standard deviation is "
            f"{health.relative_std:.2g} of their magnitude; {_RESTART}"
        )
    if health.std_before_norm is not None and health.std_before_norm < CONSTANT:
        return (
            "collapsed before the final norm, which hides it: the standard deviation of its input is "
            f"{health.std_before_norm:.2g} of its magnitude; {_RESTART}"
        )
    if health.rankme_centred < 2.0 <= health.attainable:
        return f"collapsed into one direction: {rank}; check the masks, then {_RESTART}"
    if health.rankme_centred < NARROW * health.attainable:
        return (
            f"watch: few directions: {rank}; in healthy runs it falls early and recovers, so compare with earlier and "
            "later checkpoints and with a kNN or linear probe"
        )
    if health.lidar is not None and health.lidar < 2.0:
        return (
            f"watch: different images look similar: LiDAR {health.lidar:.1f}, so views of one image differ as "
            "much as different images do; train longer; if it stays so, use a larger mask.context_scale or a higher "
            "optimizer.lr_encoder"
        )
    if health.position_r2 > POSITIONAL:
        return (
            f"watch: position only: the position of a patch explains {health.position_r2:.0%} of its features; this is "
            "usual at the start of training; if it stays so, lower model.encoder.position_scale or raise "
            "optimizer.lr_encoder"
        )
    if health.patch_spread < FLAT:
        return (
            f"watch: flat: patches of one image differ by only {health.patch_spread:.2g} of their norm, so places "
            "are not distinguished; use smaller target blocks, or weights from earlier in training"
        )
    return (
        f"healthy: {rank}, position explains {health.position_r2:.0%}, no sign of collapse; these numbers do not say "
        "how useful the features are: run a probe"
    )


def measure_features(
    encoder: PatchEncoder, source: Source, *, images: int, image_size: int | tuple[int, int], seed: int = 0
) -> tuple[dict[str, Any], Health]:
    """Measure the features of an encoder on `images` images of a source, selected by `seed`.

    Returns:
        `{"kind": "diagnosis", "data": {...}, "numbers": {name: float}}`, and the input of `verdict`. A number is None
        if it is undefined, as `alpha_req` is for constant features.

    Raises:
        UserError: an image size that the patch does not divide, or fewer than two images.
        RunError: an image cannot be decoded, or features are not finite.
    """
    size = pair(image_size)
    if any(side % encoder.patch_size for side in size):
        raise UserError("--image-size", f"patches of {encoder.patch_size} do not divide {size[0]} x {size[1]} pixels")
    chosen = choose(len(source), images, seed)
    if len(chosen) < 2:
        raise UserError("--data", f"{len(chosen)} image is not enough", "give at least 2, better 1000")
    moments = Moments()
    for start in range(0, len(chosen), BATCH):
        moments.add(encoded(encoder, crops(source, chosen[start : start + BATCH], size)))
    pooled = moments.pooled
    numbers = feature_metrics(moments) | {"relative_std": feature_std(pooled) / moments.rms if moments.rms else 0.0}
    health = Health(
        images=len(pooled),
        width=pooled.shape[1],
        rankme_centred=numbers["rankme_centred"],
        relative_std=numbers["relative_std"],
        position_r2=numbers["position_r2"],
        patch_spread=numbers["patch_spread"],
    )
    data = {"fingerprint": source.fingerprint, "images": len(pooled), "image_size": list(size), "seed": seed}
    return {"kind": "diagnosis", "data": data, "numbers": nan_to_none(numbers)}, health


def nan_to_none(numbers: dict[str, float]) -> dict[str, float | None]:
    """Return numbers with None for those that are not finite, because JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
