"""Segmentation by soft retrieval: a bank of patches with the shares of classes in them, nothing trained.

Level 1, after Balazevic et al. ("Towards in-context scene understanding", arXiv 2306.01667) and its open evaluation: a
patch's label is how often each class occurs among its pixels, a test patch takes the mean of its neighbours' labels
weighted by softmax(cosine / T), and the shares are upsampled bilinearly before the largest is taken. Ignored pixels
count for no class; a patch of ignored pixels alone is not kept. Where the bank cannot hold all patches, it takes the
same number of every image, rare classes first (`draw_rare`).

The bank takes 2 (D + C) bytes a patch, of width D and C classes, in float16; it is filled into one block of memory.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ijepa.evaluation.features.extract import Encoder
from ijepa.evaluation.features.sampling import Indices
from ijepa.evaluation.segmentation.dataset import Annotated, Classes, Labels, patch_features
from ijepa.evaluation.segmentation.ivf import InvertedIndex
from ijepa.evaluation.segmentation.patch_bank import RECALLED
from ijepa.evaluation.segmentation.protocol import SoftRetrieval
from ijepa.evaluation.segmentation.retrieval import QUERIES, patch_labels, search
from ijepa.utils.errors import UserError
from ijepa.utils.random import Stream, random_bits, uniform


class SoftBank:
    """Normalised features of patches with the shares of classes in them.

    Args:
        encoder: makes the features.
        support: the labelled images.
        classes: of their masks.
        rule: see `SoftRetrieval`.
        batch: images a forward pass.
        seed: draws each image's patches where not all are kept.

    Raises:
        UserError: masks without a scored class.
    """

    def __init__(
        self,
        encoder: Encoder,
        support: Annotated,
        classes: Classes,
        rule: SoftRetrieval,
        *,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        self.rule = rule
        whole = (support.image_size // encoder.patch_size) ** 2
        bound = whole if rule.bank_patches is None else max(1, rule.bank_patches // len(support))
        count = min(whole, bound)
        self.labels = torch.empty(len(support) * count, classes.count, dtype=torch.float16)
        self.keys, done, seen = torch.empty(0), 0, 0
        for patches, masks in patch_features(encoder, support, classes, batch):
            shares = class_shares(patch_labels(torch.from_numpy(masks), encoder.patch_size), classes)
            if count < whole:
                chosen = draw_rare(shares, support.indices[seen : seen + len(patches)], count, seed)[..., None]
                patches, shares = (x.gather(1, chosen.expand(-1, -1, x.shape[2])) for x in (patches, shares))
            seen += len(patches)
            if not self.keys.numel():
                self.keys = torch.empty(len(self.labels), patches.shape[2], dtype=torch.float16)
            kept = shares.flatten(0, 1).sum(1) > 0
            end = done + int(kept.sum())
            self.keys[done:end] = normalize(patches.flatten(0, 1)[kept], dim=1)
            self.labels[done:end] = shares.flatten(0, 1)[kept]
            done = end
        if not done:
            raise UserError(support.flag, "no patch of the masks has a class that is scored")
        self.nbytes = self.keys.nbytes + self.labels.nbytes
        self.keys, self.labels = self.keys[:done], self.labels[:done]
        self.index: InvertedIndex | None = None
        if rule.search == "inverted":
            self.index = InvertedIndex(self.keys, self.labels, lists=rule.lists, seed=seed)

    def __len__(self) -> int:
        return len(self.keys)

    def shares(self, patches: Tensor) -> Tensor:
        """Return the weighted mean of the neighbours' labels (q, C) for patches (q, D)."""
        found = []
        for some in normalize(patches, dim=1).split(QUERIES):
            near = self._near(some)
            cosine = torch.einsum("qkd,qd->qk", normalize(self.keys[near].float(), dim=2), some)
            weights = (cosine / self.rule.temperature).softmax(1)
            found.append(torch.einsum("qk,qkc->qc", weights, self.labels[near].float()))
        return torch.cat(found)

    def recall(self, patches: Tensor) -> dict[str, float | int]:
        """Return what a result says of the inverted index, measured on patches (B, N, D); empty for exact search."""
        if self.index is None:
            return {}
        queries = normalize(patches.flatten(0, 1)[:RECALLED], dim=1)
        recall = self.index.recall(queries, self.keys, self.rule.neighbours, "cosine", self.rule.probes)
        return {"lists": len(self.index), "probes": self.rule.probes, "recall": recall, "queries": len(queries)}

    def _near(self, queries: Tensor) -> Tensor:
        if self.index is None:
            return search(queries, self.keys, self.rule.neighbours, "cosine")
        return self.index.search(queries, self.keys, self.rule.neighbours, "cosine", self.rule.probes)

    def masks(self, patches: Tensor, size: int) -> Labels:
        """Return predicted masks (B, size, size) for patches (B, N, D)."""
        return largest(self.shares(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]), size)


def draw_rare(shares: Tensor, indices: Indices, count: int, seed: int) -> Tensor:
    """Return which `count` patches of each image are taken, ascending, those of rare classes more often: (B, count).

    A patch's score is the sum, over its classes, of the number of the image's patches that hold the class, times a
    uniform draw. The lowest scores are taken. Patches without a scored class come last.

    Args:
        shares: classes' shares in each patch (B, N, C).
        indices: sample numbers (B,), which the draws are made by.
        count: of patches, at most N.
        seed: of the draws.
    """
    there = shares > 0
    patches_with = there.sum(1, keepdim=True)  # (B, 1, C)
    frequency = (there * patches_with).sum(2).double()  # (B, N)
    draw = torch.from_numpy(uniform(random_bits(seed, Stream.EVALUATION, indices, shares.shape[1])))
    score = (frequency * draw).masked_fill_(frequency == 0, torch.inf)
    return score.argsort(dim=1, stable=True)[:, :count].sort(1).values


def class_shares(labels: Tensor, classes: Classes) -> Tensor:
    """Return each class's share of the scored pixels of patches (..., L): (..., C), 0 where there are none."""
    ignored = torch.isin(labels, torch.tensor(classes.ignore, dtype=labels.dtype))
    counts = torch.zeros(*labels.shape[:-1], classes.count + 1)
    counts.scatter_add_(-1, labels.masked_fill(ignored, classes.count), torch.ones(labels.shape))
    counts = counts[..., : classes.count]
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def largest(scores: Tensor, size: int) -> Labels:
    """Return the class of the largest score at each pixel, (B, size, size), for scores (B, N, C) of patches."""
    side = round(scores.shape[1] ** 0.5)
    maps = scores.transpose(1, 2).unflatten(2, (side, side))
    # Image by image: the maps of all classes at full size are the largest thing here.
    masks = [interpolate(one[None], (size, size), mode="bilinear").argmax(1) for one in maps]
    return torch.cat(masks).cpu().numpy()
