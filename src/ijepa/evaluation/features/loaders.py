"""Features for training and scoring heads.

* `CachedLoader`: features that were computed once for all images.
* `AugmentedLoader`: features of random crops for training, computed at each step; cached ones of center crops to score.
* `PatchLoader`: all patches of an image. They are too many to keep, so they are computed whenever they are read.

A random crop is a random resized crop that is flipped in half of the cases. It is drawn from (seed, position), where
position is the image's place in the endless sequence of train images: each epoch has different crops, and each run the
same. The encoder processes a crop once, for all heads.
"""

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.loading.crop import WORDS, clamped_crop_box, crop_resize, random_resized_crop_box
from ijepa.evaluation.classification.compare import Origin, Split
from ijepa.evaluation.features.extract import (
    Indices,
    View,
    center_view,
    device_of,
    image_features,
    pixel_batches,
    require_finite,
)
from ijepa.evaluation.protocols import LinearProtocol
from ijepa.utils.random import Stream, random_bits, uniform

RATIO = (3 / 4, 4 / 3)
FLIP = 0.5

Role = Literal["train", "test"]

_SCORED = 1024
"""Images per batch of cached features."""


class FeatureLoader(Protocol):
    """Features of the images of the train and the test set, by their numbers in it."""

    def train_batch(self, positions: Indices, numbers: Indices) -> Tensor:
        """Return features of the train images `numbers` (B,) at `positions` (B,) of the endless sequence."""
        ...

    def center_crops(self, role: Role, numbers: Indices) -> Iterator[Tensor]:
        """Yield features of center crops in batches, in order."""
        ...


class CachedLoader:
    """Features (B, L, D) float16 of a split."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def train_batch(self, positions: Indices, numbers: Indices) -> Tensor:
        """See `FeatureLoader`."""
        return self.split.train_x[torch.from_numpy(numbers)]

    def center_crops(self, role: Role, numbers: Indices) -> Iterator[Tensor]:
        """See `FeatureLoader`."""
        x = self.split.train_x if role == "train" else self.split.test_x
        for part in torch.from_numpy(numbers).split(_SCORED):
            yield x[part]


class AugmentedLoader(CachedLoader):
    """Features (B, L, D) float32 of random crops for training, and those of a split for scoring.

    Raises:
        RunError: an image cannot be decoded, or features are not finite.
    """

    def __init__(self, split: Split, protocol: LinearProtocol, seed: int) -> None:
        super().__init__(split)
        self.last, self.batch = max(protocol.blocks), protocol.forward_batch
        self.crops = _Crops(split.origin, protocol, seed)

    @torch.no_grad()
    def train_batch(self, positions: Indices, numbers: Indices) -> Tensor:
        """See `FeatureLoader`."""
        encoder, ranks = self.split.origin.encoder, self.split.origin.ranks
        rows = ranks.batch_rows(len(numbers), self.batch)
        crops = self.crops.random(positions[rows], numbers[rows])
        features = [require_finite(image_features(encoder, pixels, self.last).float().cpu()) for pixels in crops]
        return ranks.gather_rows(features, rows, len(numbers))


class PatchLoader:
    """Features (B, N, D) float32 of all patches of the last block.

    Raises:
        RunError: an image cannot be decoded, or features are not finite.
    """

    def __init__(self, split: Split, protocol: LinearProtocol, seed: int) -> None:
        self.origin, self.augment, self.batch = split.origin, protocol.augment, protocol.forward_batch
        self.crops = _Crops(split.origin, protocol, seed)

    @torch.no_grad()
    def train_batch(self, positions: Indices, numbers: Indices) -> Tensor:
        """See `FeatureLoader`."""
        ranks = self.origin.ranks
        rows = ranks.batch_rows(len(numbers), self.batch)
        own = numbers[rows]
        crops = self.crops.random(positions[rows], own) if self.augment else self.crops.center("train", own)
        return ranks.gather_rows([self._encode(pixels) for pixels in crops], rows, len(numbers))

    @torch.no_grad()
    def center_crops(self, role: Role, numbers: Indices) -> Iterator[Tensor]:
        """See `FeatureLoader`."""
        for pixels in self.crops.center(role, numbers):
            yield self._encode(pixels)

    def _encode(self, pixels: Tensor) -> Tensor:
        return require_finite(self.origin.encoder(pixels).float().cpu())


class _Crops:
    """Batches of pixels (B, 3, h, w) uint8 of crops, on the device of the encoder."""

    def __init__(self, origin: Origin, protocol: LinearProtocol, seed: int) -> None:
        self.origin, self.protocol, self.seed = origin, protocol, seed

    def random(self, positions: Indices, numbers: Indices) -> Iterator[Tensor]:
        draws = random_bits(self.seed, Stream.CROP, positions, WORDS + 1)
        flipped = uniform(draws[:, WORDS]) < FLIP
        box_of = clamped_crop_box if self.protocol.crop_rule == "clamp" else random_resized_crop_box

        def view(image: npt.NDArray[np.uint8], place: int) -> Tensor:
            height, width = image.shape[:2]
            box = box_of(draws[place, :WORDS], height, width, self.protocol.crop_scale, RATIO)
            pixels = crop_resize(image, box, self.origin.image_size, self.protocol.interpolation)
            return pixels.flip(2) if flipped[place] else pixels

        return self._batches("train", numbers, view)

    def center(self, role: Role, numbers: Indices) -> Iterator[Tensor]:
        protocol = self.protocol
        view = center_view(self.origin.image_size, protocol.crop_fraction, protocol.interpolation)
        return self._batches(role, numbers, view)

    def _batches(self, role: Role, numbers: Indices, view: View) -> Iterator[Tensor]:
        origin = self.origin
        source, used = (origin.train, origin.train_used) if role == "train" else (origin.test, origin.test_used)
        for pixels in pixel_batches(source, used[numbers], view, self.protocol.forward_batch):
            yield pixels.to(device_of(origin.encoder))
