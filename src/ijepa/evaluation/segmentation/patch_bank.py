"""A bank of labeled patches: the state of segmentation by retrieval.

The bank is one block of memory, allocated for the number of patches that it may hold and filled image by image, so that
nothing is held twice. Features are standardized by the mean and the standard deviation of all patches of the first
images, including patches that the bank does not keep. Later images and all queries are scaled in the same way.
"""

import numpy as np
import torch
from torch import Tensor

from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.features.sampling import Indices
from ijepa.evaluation.features.standardize import RunningMeanStd
from ijepa.evaluation.segmentation.bank_search import BankSearch
from ijepa.evaluation.segmentation.dataset import Labels, SegmentationDataset
from ijepa.evaluation.segmentation.protocol import Searched
from ijepa.evaluation.segmentation.retrieval import Distance, bank_labels, patch_labels, vote, whole_masks
from ijepa.utils.errors import UserError
from ijepa.utils.random import Stream, random_bits


def draw_patches(indices: Indices, patches: int, count: int, seed: int) -> Tensor:
    """Return which `count` of the `patches` of each sample (n,) are selected, ascending: (n, count)."""
    order = np.argsort(random_bits(seed, Stream.EVALUATION, indices, patches), axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, :count], axis=1))


class PatchBank:
    """Standardized features of labeled patches, searched by the patches of other images.

    Args:
        encoder: computes the features.
        support: the first images of the bank.
        images: largest number of images that the bank will hold.
        patches: largest number of patches. The same number is drawn from every image. None: all patches.
        batch: images per forward pass.
        seed: of that draw.
        rule: method of the search.

    Raises:
        UserError: masks without a scored class; and as `SegmentationDataset.read`.
    """

    def __init__(
        self,
        encoder: PatchEncoder,
        support: SegmentationDataset,
        *,
        images: int,
        patches: int | None = None,
        batch: int = 32,
        seed: int = 0,
        rule: Searched | None = None,
    ) -> None:
        self.encoder, self.classes, self.batch, self.seed = encoder, support.classes, batch, seed
        self.rule = rule or Searched()
        whole = (support.image_size // encoder.patch_size) ** 2
        self.per_image = whole if patches is None else min(whole, max(1, patches // images))
        capacity, small = images * self.per_image, self.classes.count <= 256
        self._keys = torch.empty(capacity, encoder.embed_dim)
        self._labels = torch.empty(capacity, encoder.patch_size**2, dtype=torch.uint8 if small else torch.int32)
        self._count = 0
        scaler = RunningMeanStd()
        self._add(support, scaler)
        if not self._count:
            raise UserError(support.flag, "no patch of the masks has a class that is scored")
        mean, std = scaler.mean_and_std()
        self.mean, self.scale = mean.float(), (1 / std).float()
        self.keys.sub_(self.mean).mul_(self.scale)
        self.search = BankSearch(self.keys, self.rule, seed)

    def __len__(self) -> int:
        return self._count

    @property
    def keys(self) -> Tensor:
        """Standardized features (m, D) float32."""
        return self._keys[: self._count]

    @property
    def labels(self) -> Tensor:
        """Classes (m, L) of the pixels of each patch."""
        return self._labels[: self._count]

    @property
    def nbytes(self) -> int:
        """Memory of the bank in bytes."""
        return self._keys.nbytes + self._labels.nbytes

    def extend(self, support: SegmentationDataset) -> None:
        """Add images; the standardization stays the same."""
        before = self._count
        self._add(support)
        self._keys[before : self._count].sub_(self.mean).mul_(self.scale)
        self.search = BankSearch(self.keys, self.rule, self.seed)

    def neighbor_labels(self, patches: Tensor, k: int, distance: Distance) -> Tensor:
        """Return the labels (B * N, k, L) of the k nearest patches of the bank, nearest first, for (B, N, D)."""
        queries = patches.flatten(0, 1).sub(self.mean).mul_(self.scale)
        return self.labels[self.search.nearest(queries, k, distance)]

    def masks(self, patches: Tensor, k: int, distance: Distance) -> Labels:
        """Return predicted masks (B, S, S) for patches (B, N, D)."""
        voted = vote(self.neighbor_labels(patches, k, distance), self.classes.count)
        return whole_masks(voted.unflatten(0, patches.shape[:2]), self.encoder.patch_size).numpy()

    def _add(self, support: SegmentationDataset, scaler: RunningMeanStd | None = None) -> None:
        """Add the labeled patches of images; `scaler` is given all patches."""
        start = 0
        for patches, masks in support.patch_features(self.encoder, self.batch):
            if scaler is not None:
                scaler.add(patches.flatten(0, 1))
            labels = patch_labels(torch.from_numpy(masks), self.encoder.patch_size)
            if self.per_image < patches.shape[1]:
                samples = support.indices[start : start + len(patches)]
                chosen = draw_patches(samples, patches.shape[1], self.per_image, self.seed)[:, :, None]
                patches, labels = (x.gather(1, chosen.expand(-1, -1, x.shape[2])) for x in (patches, labels))
            start += len(patches)
            known, kept = bank_labels(labels.flatten(0, 1), self.classes.count, self.classes.ignore)
            end = self._count + int(kept.sum())
            self._keys[self._count : end] = patches.flatten(0, 1)[kept]
            self._labels[self._count : end] = known[kept].to(self._labels.dtype)
            self._count = end
