"""Segmentation by soft retrieval: a bank of patches with the shares of the classes in them. Nothing is trained.

Level 1, as in Balazevic et al. ("Towards in-context scene understanding", arXiv 2306.01667) and its open evaluation.
The label of a patch is the share of its pixels that each class has. A test patch gets the mean of the labels of its
neighbors, weighted by softmax(cosine / T). The shares are upsampled bilinearly, and the class with the largest share is
the prediction. Ignored pixels belong to no class; a patch with ignored pixels only is not kept. If the bank cannot hold
all patches, it holds the same number from every image, preferably of rare classes (`draw_rare`).

The bank has 2 (D + C) bytes per patch, for width D and C classes in float16, in one block of memory.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.features.sampling import Indices
from ijepa.evaluation.segmentation.bank_search import BankSearch
from ijepa.evaluation.segmentation.dataset import Classes, Labels, SegmentationDataset
from ijepa.evaluation.segmentation.protocol import SoftRetrieval
from ijepa.evaluation.segmentation.retrieval import QUERIES, patch_labels
from ijepa.utils.errors import UserError
from ijepa.utils.random import Stream, random_bits, uniform


class SoftBank:
    """Normalized features of patches with the shares of the classes in them.

    Args:
        encoder: computes the features.
        support: the labeled images.
        rule: size of the bank, and how it is searched.
        batch: images per forward pass.
        seed: draws the patches of each image if not all are kept.

    Raises:
        UserError: masks without a scored class.
    """

    def __init__(
        self,
        encoder: PatchEncoder,
        support: SegmentationDataset,
        rule: SoftRetrieval,
        *,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        self.rule = rule
        whole = (support.image_size // encoder.patch_size) ** 2
        count = whole if rule.bank_patches is None else min(whole, max(1, rule.bank_patches // len(support)))
        keys = torch.empty(len(support) * count, encoder.embed_dim, dtype=torch.float16)
        labels = torch.empty(len(keys), support.classes.count, dtype=torch.float16)
        filled, images = 0, 0
        for patches, masks in support.patch_features(encoder, batch):
            shares = class_shares(patch_labels(torch.from_numpy(masks), encoder.patch_size), support.classes)
            if count < whole:
                chosen = draw_rare(shares, support.indices[images : images + len(patches)], count, seed)[..., None]
                patches, shares = (x.gather(1, chosen.expand(-1, -1, x.shape[2])) for x in (patches, shares))
            images += len(patches)
            kept = shares.flatten(0, 1).sum(1) > 0
            end = filled + int(kept.sum())
            keys[filled:end] = normalize(patches.flatten(0, 1)[kept], dim=1)
            labels[filled:end] = shares.flatten(0, 1)[kept]
            filled = end
        if not filled:
            raise UserError(support.flag, "no patch of the masks has a class that is scored")
        self.nbytes = keys.nbytes + labels.nbytes
        self.keys, self.labels = keys[:filled], labels[:filled]
        self.search = BankSearch(self.keys, rule, seed)

    def __len__(self) -> int:
        return len(self.keys)

    def shares(self, patches: Tensor) -> Tensor:
        """Return the weighted mean (q, C) of the labels of the neighbors, for patches (q, D)."""
        found = []
        for some in normalize(patches, dim=1).split(QUERIES):
            near = self.search.nearest(some, self.rule.neighbors, "cosine")
            # The keys were rounded to float16, so their length is not exactly 1.
            cosine = torch.einsum("qkd,qd->qk", normalize(self.keys[near].float(), dim=2), some)
            weights = (cosine / self.rule.temperature).softmax(1)
            found.append(torch.einsum("qk,qkc->qc", weights, self.labels[near].float()))
        return torch.cat(found)

    def masks(self, patches: Tensor, size: int) -> Labels:
        """Return predicted masks (B, size, size) for patches (B, N, D)."""
        return largest(self.shares(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]), size)


def draw_rare(shares: Tensor, indices: Indices, count: int, seed: int) -> Tensor:
    """Return which `count` patches of each image are selected, ascending, preferably of rare classes: (B, count).

    The score of a patch is the sum, over its classes, of the number of patches in the image that have the class, times
    a uniform random number. The patches with the lowest scores are selected; those without a scored class come last.

    Args:
        shares: shares of the classes in each patch (B, N, C).
        indices: sample numbers (B,), which determine the random numbers.
        count: number of patches, at most N.
        seed: of the random numbers.
    """
    present = shares > 0
    patches_with_class = present.sum(1, keepdim=True)  # (B, 1, C)
    frequency = (present * patches_with_class).sum(2).double()  # (B, N)
    draw = torch.from_numpy(uniform(random_bits(seed, Stream.EVALUATION, indices, shares.shape[1])))
    score = (frequency * draw).masked_fill_(frequency == 0, torch.inf)
    return score.argsort(dim=1, stable=True)[:, :count].sort(1).values


def class_shares(labels: Tensor, classes: Classes) -> Tensor:
    """Return the share (..., C) of each class in the scored pixels of patches (..., L); 0 if there are none."""
    ignored = torch.isin(labels, torch.tensor(classes.ignore, dtype=labels.dtype))
    counts = torch.zeros(*labels.shape[:-1], classes.count + 1)
    # Ignored pixels are counted in an extra column, which is dropped.
    counts.scatter_add_(-1, labels.masked_fill(ignored, classes.count), torch.ones(labels.shape))
    counts = counts[..., : classes.count]
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def largest(scores: Tensor, size: int) -> Labels:
    """Return the class with the largest upsampled score at each pixel, (B, size, size), for scores (B, N, C)."""
    side = round(scores.shape[1] ** 0.5)
    maps = scores.transpose(1, 2).unflatten(2, (side, side))  # (B, C, side, side)
    # One image at a time, because the maps of all classes at full size take the most memory.
    masks = [interpolate(one[None], (size, size), mode="bilinear").argmax(1) for one in maps]
    return torch.cat(masks).cpu().numpy()
