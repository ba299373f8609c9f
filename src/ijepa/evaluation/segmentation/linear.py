"""Segmentation by a trained linear layer on frozen patch features: level 2.

A batch norm and one linear layer read each patch; logits are upsampled bilinearly to the mask, and the cross-entropy is
that of its pixels. Whole images are seen, resized to a square, as in the other protocols here: there is no
sliding window and no augmentation. In training channels are left out image by image (dropout of whole channels). The
steps run through the images in an order of the seed's; features that fit into memory are made once.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ijepa.data.loading.shuffle import sample_indices
from ijepa.evaluation.classification.linear_heads import normal
from ijepa.evaluation.features.extract import Encoder, device_of
from ijepa.evaluation.features.sampling import Indices
from ijepa.evaluation.segmentation.dataset import Annotated, Classes, Labels, patch_features
from ijepa.evaluation.segmentation.hummingbird import largest
from ijepa.evaluation.segmentation.protocol import LinearHead
from ijepa.utils.random import Stream, random_bits, uniform

KEPT = 2 << 30
"""Bytes that features and masks of the training images may take in memory; above, they are made at every step."""

BARRED = -1e6
"""Added to the logits of classes that are not scored, so that they are never an answer."""

_IGNORED = -100


class Layer(nn.Module):
    """Batch norm and linear layer: patches (B, N, D) -> logits (B, N, C)."""

    def __init__(self, width: int, classes: Classes, seed: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, classes.count)
        with torch.no_grad():
            self.linear.weight.copy_(normal(width * classes.count, seed).view(classes.count, width) * 0.01)
            self.linear.bias.zero_()
        barred = torch.zeros(classes.count)
        barred[[label for label in classes.ignore if label < classes.count]] = BARRED
        self.register_buffer("barred", barred)
        self.barred: Tensor

    def forward(self, patches: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return logits; `channels` (B, D) multiplies what the layer reads."""
        x = self.norm(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return self.linear(x if channels is None else x * channels[:, None]) + self.barred

    @torch.no_grad()
    def masks(self, patches: Tensor, size: int) -> Labels:
        """Return predicted masks (B, size, size) for patches (B, N, D)."""
        return largest(self(patches.to(self.barred.device)), size)


def train_layer(
    encoder: Encoder, support: Annotated, classes: Classes, rule: LinearHead, *, seed: int, batch: int = 32
) -> Layer:
    """Return the layer trained on a labelled set, in eval mode, where the encoder lies.

    Raises:
        UserError, RunError: as `annotated.patch_features`.
    """
    images = _Images(encoder, support, classes, batch)
    patches, _ = images[np.arange(1)]
    device = device_of(encoder)
    layer = Layer(patches.shape[2], classes, seed).to(device)
    matrix = [layer.linear.weight]
    rest = [layer.linear.bias, *layer.norm.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": matrix, "weight_decay": rule.weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=rule.lr
    )
    size = min(rule.batch, len(support))
    for step in range(rule.steps):
        positions = np.arange(step * size, (step + 1) * size)
        patches, masks = images[sample_indices(seed, positions, len(support))]
        kept = uniform(random_bits(seed, Stream.EVALUATION, positions, patches.shape[2])) >= rule.dropout
        channels = torch.from_numpy(kept).to(device).float() / (1 - rule.dropout)
        for group in optimizer.param_groups:
            group["lr"] = rule.lr * _factor(step, rule)
        optimizer.zero_grad()
        loss_of(layer(patches.to(device), channels), masks.to(device)).backward()
        optimizer.step()
    return layer.eval()


def loss_of(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the cross-entropy of pixels (B, S, S), ignored ones -100, by logits (B, N, C) of patches."""
    side = round(logits.shape[1] ** 0.5)
    maps = logits.transpose(1, 2).unflatten(2, (side, side))
    total = cross_entropy(interpolate(maps, masks.shape[1:], mode="bilinear"), masks, reduction="sum")
    return total / (masks != _IGNORED).sum().clamp_min(1)


def _factor(step: int, rule: LinearHead) -> float:
    rise = round(rule.warmup * rule.steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / (rule.steps - rise))) / 2


class _Images:
    """Patches (B, N, D) float32 and masks (B, S, S) int64 of images by their places, kept where they fit.

    Patches are rounded to float16 whether they are kept or made anew, so that a set's size changes no number.
    """

    def __init__(self, encoder: Encoder, support: Annotated, classes: Classes, batch: int) -> None:
        self.encoder, self.support, self.classes, self.batch = encoder, support, classes, batch
        patches, masks = self._made(np.arange(1))
        self._kept: tuple[Tensor, ...] | None = None
        if len(support) * (2 * patches.numel() + 8 * masks.numel()) <= KEPT:
            self._kept = tuple(part.new_empty(len(support), *part.shape[1:]) for part in (patches, masks))
            for places in np.array_split(np.arange(len(support)), -(-len(support) // batch)):
                for kept, part in zip(self._kept, self._made(places), strict=True):
                    kept[torch.from_numpy(places)] = part

    def __getitem__(self, places: Indices) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(places)
        patches, masks = self._made(places) if self._kept is None else (part[chosen] for part in self._kept)
        return patches.float(), masks

    def _made(self, places: Indices) -> tuple[Tensor, Tensor]:
        some = replace(self.support, indices=self.support.indices[places])
        made = list(patch_features(self.encoder, some, self.classes, self.batch))
        masks = torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for _, part in made]))
        ignored = torch.isin(masks, torch.tensor(self.classes.ignore))
        return torch.cat([part.half() for part, _ in made]), masks.masked_fill(ignored, _IGNORED)
