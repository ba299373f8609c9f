"""What heads read: each step's training features, and those of central views where they are scored.

* `Cached`: features made once, in one pass over the images.
* `Augmented`: training features of random views, made while heads train; scored on the cached central ones.
* `Tokens`: every patch of an image, too much to keep: made whenever they are read, of random or central views.

A random view is a random resized crop, flipped half of the time, drawn from (seed, position): position is the sample's
place in the endless sequence that the heads walk through, so that an image's view is another one in every epoch and the
same in every run. The backbone goes over a view once, however many heads read it.
"""

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.loading.crop import WORDS, clamped_crop_box, crop_resize, random_resized_crop_box
from ijepa.evaluation.classification.compare import Origin, Split
from ijepa.evaluation.features.extract import Indices, View, central_view, device_of, image_features, pixel_batches
from ijepa.evaluation.protocols import LinearProtocol
from ijepa.utils.errors import RunError
from ijepa.utils.random import Stream, random_bits, uniform

RATIO = (3 / 4, 4 / 3)
FLIP = 0.5

Role = Literal["train", "test"]

_SCORED = 1024


class Reading(Protocol):
    """Features of images, by their places in the train or the test set."""

    def training(self, positions: Indices, chosen: Indices) -> Tensor:
        """Return features of the train images at places `chosen` (B,), at `positions` (B,) of the sequence."""
        ...

    def central(self, role: Role, places: Indices) -> Iterator[Tensor]:
        """Yield features of central views, in order, some images at a time."""
        ...


class Cached:
    """Features (B, L, D) float16 as `split` holds them."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def training(self, positions: Indices, chosen: Indices) -> Tensor:
        """See `Reading`."""
        return self.split.train_x[torch.from_numpy(chosen)]

    def central(self, role: Role, places: Indices) -> Iterator[Tensor]:
        """See `Reading`."""
        x = self.split.train_x if role == "train" else self.split.test_x
        for part in torch.from_numpy(places).split(_SCORED):
            yield x[part]


class Augmented(Cached):
    """Features (B, L, D) float32 of random views for training, those of `split` for scoring.

    Raises:
        RunError: an image cannot be decoded, or features are not finite.
    """

    def __init__(self, split: Split, protocol: LinearProtocol, seed: int) -> None:
        super().__init__(split)
        self.last, self.batch = max(protocol.blocks), protocol.forward_batch
        self.views = _Views(split.origin, protocol, seed)

    @torch.no_grad()
    def training(self, positions: Indices, chosen: Indices) -> Tensor:
        """See `Reading`."""
        encoder, ranks = self.split.origin.encoder, self.split.origin.ranks
        rows = ranks.batch_rows(len(chosen), self.batch)
        views = self.views.random(positions[rows], chosen[rows])
        made = [_finite(image_features(encoder, pixels, self.last)) for pixels in views]
        return ranks.gather_rows(made, rows, len(chosen))


class Tokens:
    """Features (B, N, D) float32 of every patch of the last block.

    Raises:
        RunError: an image cannot be decoded, or features are not finite.
    """

    def __init__(self, split: Split, protocol: LinearProtocol, seed: int) -> None:
        self.origin, self.augment, self.batch = split.origin, protocol.augment, protocol.forward_batch
        self.views = _Views(split.origin, protocol, seed)

    @torch.no_grad()
    def training(self, positions: Indices, chosen: Indices) -> Tensor:
        """See `Reading`."""
        ranks = self.origin.ranks
        rows = ranks.batch_rows(len(chosen), self.batch)
        mine, places = chosen[rows], positions[rows]
        views = self.views.random(places, mine) if self.augment else self.views.central("train", mine)
        return ranks.gather_rows([_finite(self.origin.encoder(pixels)) for pixels in views], rows, len(chosen))

    @torch.no_grad()
    def central(self, role: Role, places: Indices) -> Iterator[Tensor]:
        """See `Reading`."""
        for pixels in self.views.central(role, places):
            yield _finite(self.origin.encoder(pixels))


class _Views:
    """Pixels of views, some images at a time, where the encoder lies."""

    def __init__(self, origin: Origin, protocol: LinearProtocol, seed: int) -> None:
        self.origin, self.protocol, self.seed = origin, protocol, seed

    def random(self, positions: Indices, chosen: Indices) -> Iterator[Tensor]:
        draws = random_bits(self.seed, Stream.CROP, positions, WORDS + 1)
        mirrored = uniform(draws[:, WORDS]) < FLIP
        box_of = clamped_crop_box if self.protocol.crop_rule == "clamp" else random_resized_crop_box

        def view(image: npt.NDArray[np.uint8], place: int) -> Tensor:
            height, width = image.shape[:2]
            box = box_of(draws[place, :WORDS], height, width, self.protocol.crop_scale, RATIO)
            pixels = crop_resize(image, box, self.origin.image_size, self.protocol.interpolation)
            return pixels.flip(2) if mirrored[place] else pixels

        return self._of("train", chosen, view)

    def central(self, role: Role, places: Indices) -> Iterator[Tensor]:
        protocol = self.protocol
        view = central_view(self.origin.image_size, protocol.crop_fraction, protocol.interpolation)
        return self._of(role, places, view)

    def _of(self, role: Role, places: Indices, view: View) -> Iterator[Tensor]:
        origin = self.origin
        source, used = (origin.train, origin.train_used) if role == "train" else (origin.test, origin.test_used)
        for pixels in pixel_batches(source, used[places], view, self.protocol.forward_batch):
            yield pixels.to(device_of(origin.encoder))


def _finite(x: Tensor) -> Tensor:
    x = x.float().cpu()
    if not bool(x.isfinite().all()):
        raise RunError("the encoder's features are not finite numbers: its weights are broken, or overflow")
    return x
