"""A bank of labelled patches and its answers: the state of segmentation by retrieval.

The bank is one block of memory, allocated for the number of patches it may hold and filled image by image, so that
nothing is held twice. Features are standardised by the mean and deviation of all patches of the images it begins with,
those that it does not keep among them: images that come later, and all queries, are measured by the same rule.
"""

import numpy as np
import torch
from torch import Tensor

from ijepa.evaluation.features.extract import Encoder
from ijepa.evaluation.features.sampling import Indices
from ijepa.evaluation.segmentation.clustering import Scaler
from ijepa.evaluation.segmentation.dataset import Annotated, Classes, Labels, patch_features
from ijepa.evaluation.segmentation.ivf import InvertedIndex
from ijepa.evaluation.segmentation.protocol import Searched
from ijepa.evaluation.segmentation.retrieval import Distance, bank_labels, patch_labels, search, vote, whole_masks
from ijepa.utils.errors import UserError
from ijepa.utils.random import Stream, random_bits

RECALLED = 784
"""Patches on which an inverted index's recall is measured."""


def draw_patches(indices: Indices, patches: int, count: int, seed: int) -> Tensor:
    """Return which `count` of the `patches` of each sample (n,) are taken, ascending: (n, count)."""
    order = np.argsort(random_bits(seed, Stream.EVALUATION, indices, patches), axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, :count], axis=1))


class PatchBank:
    """Standardised features of labelled patches, searched by other images' patches.

    Args:
        encoder: makes the features.
        support: images the bank begins with.
        classes: of their masks.
        images: how many images it may come to hold.
        patches: how many patches at most, the same number of every image, drawn by seed; all if None.
        batch: images a forward pass.
        seed: of that draw.
        rule: how it is searched; exactly if None.
    """

    def __init__(
        self,
        encoder: Encoder,
        support: Annotated,
        classes: Classes,
        *,
        images: int,
        patches: int | None = None,
        batch: int = 32,
        seed: int = 0,
        rule: Searched | None = None,
    ) -> None:
        self.encoder, self.classes, self.batch, self.seed = encoder, classes, batch, seed
        self.rule = rule or Searched()
        self._index: InvertedIndex | None = None
        whole = (support.image_size // encoder.patch_size) ** 2
        self.per_image = whole if patches is None else min(whole, max(1, patches // images))
        self._capacity, self._count = images * self.per_image, 0
        self._keys: Tensor = torch.empty(0)
        self._labels: Tensor = torch.empty(0)
        scaler = Scaler()
        self._fill(support, scaler)
        if not self._count:
            raise UserError(support.flag, "no patch of the masks has a class that is scored")
        self.mean, self.scale = scaler.figures()
        self.keys.sub_(self.mean).mul_(self.scale)

    def __len__(self) -> int:
        return self._count

    @property
    def keys(self) -> Tensor:
        """Standardised features (m, D) float32."""
        return self._keys[: self._count]

    @property
    def labels(self) -> Tensor:
        """The classes of each patch's pixels (m, L)."""
        return self._labels[: self._count]

    @property
    def nbytes(self) -> int:
        """Memory the bank takes."""
        return self._keys.nbytes + self._labels.nbytes

    def extend(self, support: Annotated) -> None:
        """Add images; the standardisation stays."""
        before = self._count
        self._fill(support)
        self._keys[before : self._count].sub_(self.mean).mul_(self.scale)
        self._index = None  # made again at the next search

    def neighbours(self, patches: Tensor, k: int, distance: Distance) -> Tensor:
        """Return the labels (B * N, k, L) of the k nearest of the bank, nearest first, for patches (B, N, D)."""
        queries = self._standardised(patches)
        if self.rule.search == "exact":
            return self.labels[search(queries, self.keys, k, distance)]
        return self.labels[self.index.search(queries, self.keys, k, distance, self.rule.probes)]

    @property
    def index(self) -> InvertedIndex:
        """The inverted index; making it changes the order of keys and labels."""
        if self._index is None:
            self._index = InvertedIndex(self.keys, self.labels, lists=self.rule.lists, seed=self.seed)
        return self._index

    def recall(self, patches: Tensor, k: int, distance: Distance) -> dict[str, float | int]:
        """Return what a result says of the inverted index, measured on patches (B, N, D); empty for exact search."""
        if self.rule.search == "exact":
            return {}
        queries = self._standardised(patches)[:RECALLED]
        recall = self.index.recall(queries, self.keys, k, distance, self.rule.probes)
        return {"lists": len(self.index), "probes": self.rule.probes, "recall": recall, "queries": len(queries)}

    def _standardised(self, patches: Tensor) -> Tensor:
        return patches.flatten(0, 1).sub(self.mean).mul_(self.scale)

    def masks(self, patches: Tensor, k: int, distance: Distance) -> Labels:
        """Return predicted masks (B, S, S) for patches (B, N, D)."""
        voted = vote(self.neighbours(patches, k, distance), self.classes.count)
        return whole_masks(voted.unflatten(0, patches.shape[:2]), self.encoder.patch_size).numpy()

    def _fill(self, support: Annotated, scaler: Scaler | None = None) -> None:
        """Add the labelled patches of images; `scaler` sees all patches."""
        start = 0
        for patches, masks in patch_features(self.encoder, support, self.classes, self.batch):
            if scaler is not None:
                scaler.add(patches.flatten(0, 1))
            labels = patch_labels(torch.from_numpy(masks), self.encoder.patch_size)
            if self.per_image < patches.shape[1]:
                some = support.indices[start : start + len(patches)]
                chosen = draw_patches(some, patches.shape[1], self.per_image, self.seed)
                patches = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))
                labels = labels.gather(1, chosen[:, :, None].expand(-1, -1, labels.shape[2]))
            start += len(patches)
            known, kept = bank_labels(labels.flatten(0, 1), self.classes.count, self.classes.ignore)
            if not self._keys.numel():
                small = torch.uint8 if self.classes.count <= 256 else torch.int32
                self._keys = torch.empty(self._capacity, patches.shape[2])
                self._labels = torch.empty(self._capacity, labels.shape[2], dtype=small)
            end = self._count + int(kept.sum())
            self._keys[self._count : end] = patches.flatten(0, 1)[kept]
            self._labels[self._count : end] = known[kept].to(self._labels.dtype)
            self._count = end
