"""Segmentation by a linear layer that is trained on frozen patch features: level 2.

A batch norm and one linear layer read each patch. The logits are upsampled bilinearly to the size of the mask, and the
loss is the cross-entropy of its pixels. Whole images are resized to a square, as in the other protocols here, without a
sliding window or augmentation. In training, whole channels of an image are dropped. The seed determines the order of
the images. Their features are kept in memory if they fit.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ijepa.data.loading.shuffle import sample_indices
from ijepa.evaluation.classification.linear_heads import normal
from ijepa.evaluation.features.extract import PatchEncoder, device_of
from ijepa.evaluation.features.sampling import Indices
from ijepa.evaluation.segmentation.dataset import Classes, Labels, SegmentationDataset
from ijepa.evaluation.segmentation.hummingbird import largest
from ijepa.evaluation.segmentation.protocol import LinearHead
from ijepa.utils.random import Stream, random_bits, uniform

CACHE_BYTES = 2 << 30
"""Largest size of features and masks that are kept in memory. If they are larger, each step computes its own."""

_EXCLUDED = -1e6
"""Added to the logits of classes that are not scored, so that they are never predicted."""

_IGNORED = -100


class Layer(nn.Module):
    """Batch norm and linear layer: patches (B, N, D) -> logits (B, N, C)."""

    def __init__(self, width: int, classes: Classes, seed: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, classes.count)
        with torch.no_grad():
            self.linear.weight.copy_(normal(width * classes.count, seed).view(classes.count, width) * 0.01)
            self.linear.bias.zero_()
        excluded = torch.zeros(classes.count)
        excluded[[label for label in classes.ignore if label < classes.count]] = _EXCLUDED
        self.register_buffer("excluded", excluded)
        self.excluded: Tensor

    def forward(self, patches: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return logits; the input of the linear layer is multiplied by `channels` (B, D)."""
        x = self.norm(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return self.linear(x if channels is None else x * channels[:, None]) + self.excluded

    @torch.no_grad()
    def masks(self, patches: Tensor, size: int) -> Labels:
        """Return predicted masks (B, size, size) for patches (B, N, D)."""
        return largest(self(patches.to(self.excluded.device)), size)


def train_layer(
    encoder: PatchEncoder, support: SegmentationDataset, rule: LinearHead, *, seed: int, batch: int = 32
) -> Layer:
    """Return the layer trained on a labeled set, in eval mode, on the device of the encoder.

    Raises:
        UserError, RunError: as `SegmentationDataset.read`.
    """
    images = _TrainingImages(encoder, support, batch)
    device = device_of(encoder)
    layer = Layer(encoder.embed_dim, support.classes, seed).to(device)
    matrix = [layer.linear.weight]
    rest = [layer.linear.bias, *layer.norm.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": matrix, "weight_decay": rule.weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=rule.lr
    )
    size = min(rule.batch, len(support))
    for step in range(rule.steps):
        positions = np.arange(step * size, (step + 1) * size)
        patches, masks = images[sample_indices(seed, positions, len(support))]
        kept = uniform(random_bits(seed, Stream.EVALUATION, positions, encoder.embed_dim)) >= rule.dropout
        channels = torch.from_numpy(kept).to(device).float() / (1 - rule.dropout)
        for group in optimizer.param_groups:
            group["lr"] = rule.lr * _lr_factor(step, rule)
        optimizer.zero_grad()
        loss_of(layer(patches.to(device), channels), masks.to(device)).backward()
        optimizer.step()
    return layer.eval()


def loss_of(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean cross-entropy of the pixels of masks (B, S, S), where -100 is ignored, for logits (B, N, C)."""
    side = round(logits.shape[1] ** 0.5)
    maps = logits.transpose(1, 2).unflatten(2, (side, side))  # (B, C, side, side)
    total = cross_entropy(interpolate(maps, masks.shape[1:], mode="bilinear"), masks, reduction="sum")
    return total / (masks != _IGNORED).sum().clamp_min(1)


def _lr_factor(step: int, rule: LinearHead) -> float:
    """Return the factor of the peak learning rate: linear warm-up, then a cosine schedule to 0."""
    rise = round(rule.warmup * rule.steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / (rule.steps - rise))) / 2


class _TrainingImages:
    """Patches (B, N, D) float32 and masks (B, S, S) int64 of images by their places in the training set.

    Patches are rounded to float16 even if they are not kept, so that the size of a set does not change results.
    """

    def __init__(self, encoder: PatchEncoder, support: SegmentationDataset, batch: int) -> None:
        self.encoder, self.support, self.batch = encoder, support, batch
        patches, masks = self._compute(np.arange(1))
        self._kept: tuple[Tensor, ...] | None = None
        if len(support) * (2 * patches.numel() + 8 * masks.numel()) <= CACHE_BYTES:
            # Filled part by part: to concatenate the parts would need twice the memory.
            self._kept = tuple(part.new_empty(len(support), *part.shape[1:]) for part in (patches, masks))
            for places in np.array_split(np.arange(len(support)), -(-len(support) // batch)):
                for kept, part in zip(self._kept, self._compute(places), strict=True):
                    kept[torch.from_numpy(places)] = part

    def __getitem__(self, places: Indices) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(places)
        patches, masks = self._compute(places) if self._kept is None else (part[chosen] for part in self._kept)
        return patches.float(), masks

    def _compute(self, places: Indices) -> tuple[Tensor, Tensor]:
        batches = list(self.support.select(places).patch_features(self.encoder, self.batch))
        masks = torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for _, part in batches]))
        ignored = torch.isin(masks, torch.tensor(self.support.classes.ignore))
        return torch.cat([part.half() for part, _ in batches]), masks.masked_fill(ignored, _IGNORED)
