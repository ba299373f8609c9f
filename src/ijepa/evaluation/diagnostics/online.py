"""Diagnosis during pretraining: metrics of the target encoder on one fixed batch, as a function of the model.

The batch is decoded at the first call and kept as bytes; an image that cannot be read is replaced by the next one. The
model runs as in pretraining (the target encoder is always in eval mode, without gradients), and its state does not
change. If the data have labels, the accuracy of leave-one-out kNN is added, which shows progress long before the loss
does. Labels are read for this number only; training never sees it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ijepa.data.sources.base import Source
from ijepa.evaluation.diagnostics.metrics import BATCH, Moments, feature_metrics, leave_one_out_knn, nan_to_none
from ijepa.evaluation.diagnostics.per_layer import TokenStd, record_norm_inputs
from ijepa.evaluation.features.sampling import Indices, choose, pair, readable_crops
from ijepa.model.ijepa import IJEPA
from ijepa.model.vision_transformer import patchify

KNN_IMAGES = 512
"""Least number of images with labels: with fewer, the accuracy of kNN is too noisy."""


def online_diagnosis(
    source: Source, image_size: int | tuple[int, int], *, images: int = 256, seed: int = 0
) -> Callable[[IJEPA], dict[str, float]]:
    """Return a function of the model that returns `feature_metrics`, `std_before_norm` and, with labels, `knn`.

    Metrics that are undefined, as `alpha_req` is for constant features, are left out.

    Args:
        source: source of the batch, preferably one that is not trained on.
        image_size: image size of the model in pixels.
        images: size of the batch; at least 512 if the source has labels.
        seed: seed of the selection of images.
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
        for pixels in self.pixels.split(BATCH):
            patches = patchify(pixels.to(device), model.target_encoder.patch_size)
            with record_norm_inputs(model.target_encoder.norm) as inputs:
                moments.add(model.encode_targets(patches, len(pixels)).unflatten(0, (len(pixels), -1)).cpu())
            std.add(torch.cat(inputs))
        numbers = nan_to_none(feature_metrics(moments) | {"std_before_norm": std.value})
        measured = {name: value for name, value in numbers.items() if value is not None}
        if self.source.labels is not None:
            labels = torch.from_numpy(self.source.labels[self.chosen]).long()
            known = labels >= 0
            if int(known.sum()) > 1:
                measured["knn"] = leave_one_out_knn(moments.pooled[known], labels[known])
        return measured
