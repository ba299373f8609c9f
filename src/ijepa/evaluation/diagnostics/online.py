"""Diagnosis during pretraining: the target encoder on one fixed batch, as a function that the loop calls.

The batch is decoded once, at the first call, and kept as bytes; an image that cannot be read gives way to the next one.
The model is run as in pretraining (its target encoder is always in eval mode, without gradients) and nothing of its
state changes. Where the data have labels, the accuracy of a leave-one-out kNN is added: a first sign of learning long
before the loss tells. Labels are read for that figure and for nothing else; training never sees it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ijepa.data.sources.base import Source
from ijepa.evaluation.diagnostics.by_layer import TokenStd, before_norm
from ijepa.evaluation.diagnostics.metrics import Moments, defined, figures, nearest_vote
from ijepa.evaluation.features.sampling import Indices, choose, pair, readable_crops
from ijepa.model.ijepa import IJEPA
from ijepa.model.vision_transformer import patchify

KNN_IMAGES = 512
"""Least number of images where labels are at hand: fewer make leave-one-out accuracy a matter of luck."""

_BATCH = 64


def online_diagnosis(
    source: Source, image_size: int | tuple[int, int], *, images: int = 256, seed: int = 0
) -> Callable[[IJEPA], dict[str, float]]:
    """Return a function of the model: `diagnostics.figures`, `std_before_norm`, and `knn`.

    What features leave undefined, as constant ones do `alpha_req`, is left out.

    Args:
        source: where the batch comes from; better one that is not trained on.
        image_size: the model's image size in pixels.
        images: size of the batch; at least 512 where the source has labels (`knn` is there only then).
        seed: chooses the images.
    """
    return _Diagnosis(source, pair(image_size), images if source.labels is None else max(images, KNN_IMAGES), seed)


class _Diagnosis:
    def __init__(self, source: Source, size: tuple[int, int], images: int, seed: int) -> None:
        self.source, self.size = source, size
        self.chosen: Indices = choose(len(source), images, seed)
        self.pixels: Tensor | None = None

    @torch.no_grad()
    def __call__(self, model: IJEPA) -> dict[str, float]:
        if self.pixels is None:
            self.pixels, self.chosen = readable_crops(self.source, self.chosen, self.size)
        device = next(model.target_encoder.parameters()).device
        moments, std = Moments(), TokenStd()
        for pixels in self.pixels.split(_BATCH):
            patches = patchify(pixels.to(device), model.target_encoder.patch_size)
            with before_norm(model.target_encoder.norm) as raw:
                moments.add(model.encode_targets(patches, len(pixels)).unflatten(0, (len(pixels), -1)).cpu())
            std.add(torch.cat(raw))
        numbers = defined(figures(moments) | {"std_before_norm": std.value})
        measured = {name: value for name, value in numbers.items() if value is not None}
        if self.source.labels is not None:
            labels = torch.from_numpy(self.source.labels[self.chosen]).long()
            known = labels >= 0
            if int(known.sum()) > 1:
                measured["knn"] = nearest_vote(moments.pooled[known], labels[known])
        return measured
