"""What heads read: each step's training features, and those of central views where they are scored.

* `Cached`: features made once, in one pass over the images.
* `Augmented`: training features of random views, made while heads train; scored on the cached central ones.
* `Tokens`: every patch of an image, too much to keep: made whenever they are read, of random or central views.

A random view is a random resized crop, flipped half of the time, drawn from (seed, position): position is the sample's
place in the endless sequence that the heads walk through, so that an image's view is another one in every epoch and the
same in every run. The backbone goes over a view once, however many heads read it.
"""

from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.crop import WORDS, crop_resize, random_resized_crop_box
from ijepa.errors import Failed
from ijepa.evaluation.classification import Origin, Split
from ijepa.evaluation.features import Indices, View, central_view, device_of, encoded_batches, image_features
from ijepa.evaluation.protocol import LinearProtocol
from ijepa.randomness import Stream, uniform, words

RATIO = (3 / 4, 4 / 3)
FLIP = 0.5

Encode = Callable[[Tensor], Tensor]

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
        Failed: an image cannot be decoded, or features are not finite.
    """

    def __init__(self, split: Split, protocol: LinearProtocol, seed: int) -> None:
        super().__init__(split)
        self.last = max(protocol.blocks)
        self.views = _Views(split.origin, protocol, seed)

    @torch.no_grad()
    def training(self, positions: Indices, chosen: Indices) -> Tensor:
        """See `Reading`."""
        origin = self.split.origin
        views = self.views.random(positions, chosen, lambda pixels: image_features(origin.encoder, pixels, self.last))
        return torch.cat(list(views))


class Tokens:
    """Features (B, N, D) float32 of every patch of the last block.

    Raises:
        Failed: an image cannot be decoded, or features are not finite.
    """

    def __init__(self, split: Split, protocol: LinearProtocol, seed: int) -> None:
        self.origin, self.augment = split.origin, protocol.augment
        self.views = _Views(split.origin, protocol, seed)

    @torch.no_grad()
    def training(self, positions: Indices, chosen: Indices) -> Tensor:
        """See `Reading`."""
        encode = self.origin.encoder
        if self.augment:
            return torch.cat(list(self.views.random(positions, chosen, encode)))
        return torch.cat(list(self.views.central("train", chosen, encode)))

    @torch.no_grad()
    def central(self, role: Role, places: Indices) -> Iterator[Tensor]:
        """See `Reading`."""
        yield from self.views.central(role, places, self.origin.encoder)


class _Views:
    """What an encoder makes of views, some images at a time; float32 in main memory."""

    def __init__(self, origin: Origin, protocol: LinearProtocol, seed: int) -> None:
        self.origin, self.protocol, self.seed = origin, protocol, seed

    def random(self, positions: Indices, chosen: Indices, encode: Encode) -> Iterator[Tensor]:
        draws = words(self.seed, Stream.CROP, positions, WORDS + 1)
        mirrored = uniform(draws[:, WORDS]) < FLIP

        def view(image: npt.NDArray[np.uint8], place: int) -> Tensor:
            height, width = image.shape[:2]
            box = random_resized_crop_box(draws[place, :WORDS], height, width, self.protocol.crop_scale, RATIO)
            pixels = crop_resize(image, box, self.origin.image_size)
            return pixels.flip(2) if mirrored[place] else pixels

        return self._of("train", chosen, view, encode)

    def central(self, role: Role, places: Indices, encode: Encode) -> Iterator[Tensor]:
        return self._of(role, places, central_view(self.origin.image_size, self.protocol.crop_fraction), encode)

    def _of(self, role: Role, places: Indices, view: View, encode: Encode) -> Iterator[Tensor]:
        origin = self.origin
        source, used = (origin.train, origin.train_used) if role == "train" else (origin.test, origin.test_used)
        device = device_of(origin.encoder)
        return encoded_batches(
            source,
            used[places],
            view,
            self.protocol.forward_batch,
            lambda pixels: _finite(encode(pixels.to(device))),
        )


def _finite(x: Tensor) -> Tensor:
    x = x.float().cpu()
    if not bool(x.isfinite().all()):
        raise Failed("the encoder's features are not finite numbers: its weights are broken, or overflow")
    return x
