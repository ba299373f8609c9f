"""Features of random views, made while heads train: what protocols with augmentation read instead of a cache.

A view is a random resized crop, flipped half of the time, drawn from (seed, position): position is the sample's place
in the endless sequence that the heads walk through, so that an image's view is another one in every epoch and the same
in every run. The backbone goes over a view once, however many heads read it.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ijepa.data.crop import WORDS, crop_resize, random_resized_crop_box
from ijepa.data.sources import Source
from ijepa.errors import Failed
from ijepa.evaluation.features import Encoder, Indices, device_of, image_features, pixel_batches
from ijepa.randomness import Stream, uniform, words

RATIO = (3 / 4, 4 / 3)


class AugmentedFeatures:
    """Features of random views of a source's images.

    Args:
        encoder: makes them, where its parameters lie.
        source: the images.
        used: numbers in the source of the images that may be asked for.
        image_size: height and width in pixels of a view.
        last: blocks to take, from the last one backwards.
        scale: bounds of a view's share of the image's area.
        flip: how often a view is mirrored.
        seed: of the draws.
        batch: images a forward pass.
    """

    def __init__(
        self,
        encoder: Encoder,
        source: Source,
        used: Indices,
        *,
        image_size: tuple[int, int],
        last: int,
        scale: tuple[float, float],
        flip: float,
        seed: int,
        batch: int = 64,
    ) -> None:
        self.encoder, self.source, self.used = encoder, source, used
        self.image_size, self.last, self.batch = image_size, last, batch
        self.scale, self.flip, self.seed = scale, flip, seed

    @torch.no_grad()
    def __call__(self, positions: Indices, chosen: Indices) -> Tensor:
        """Return features (B, L, D) float32 of views at `positions` (B,) of the images `used[chosen]`.

        Raises:
            Failed: an image cannot be decoded, or features are not finite.
        """
        draws = words(self.seed, Stream.CROP, positions, WORDS + 1)
        mirrored = uniform(draws[:, WORDS]) < self.flip

        def view(image: npt.NDArray[np.uint8], place: int) -> Tensor:
            height, width = image.shape[:2]
            box = random_resized_crop_box(draws[place, :WORDS], height, width, self.scale, RATIO)
            pixels = crop_resize(image, box, self.image_size)
            return pixels.flip(2) if mirrored[place] else pixels

        device = device_of(self.encoder)
        parts = [
            image_features(self.encoder, pixels.to(device), self.last).float().cpu()
            for pixels in pixel_batches(self.source, self.used[chosen], view, self.batch)
        ]
        x = torch.cat(parts)
        if not bool(x.isfinite().all()):
            raise Failed("the encoder's features are not finite numbers: its weights are broken, or overflow")
        return x
