"""One object per image, segmented by the similarity of its patches: TokenCut (Wang et al., arXiv 2202.11539).

Level 0: labels are only used for scoring. The edge between two patches has the weight 1 if their cosine is above `tau`,
else `eps`. The second eigenvector of (D - W) v = l D v is the relaxed normalized cut of this graph. It is thresholded
at its mean, and the side with the entry of largest magnitude is the foreground. The connected part of the foreground
that has this patch gives the box.

The sign of an eigenvector is arbitrary, a repeated eigenvalue has many eigenvectors, and patches with the same
neighbors have equal entries that differ by rounding. `cut` decides all three by rules, so that the result does not
depend on the linear algebra library or the CPU.

The original uses keys of the last attention layer of an encoder trained by DINO; here it is the output of the last
block, as in all protocols. Its bilateral refinement of masks is left out. The boxes of objects are computed from the
masks: one for each connected part of each class.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn.functional import normalize

from ijepa.evaluation.features.extract import PatchEncoder
from ijepa.evaluation.metrics.accuracy import interval
from ijepa.evaluation.metrics.bootstrap import mean_interval
from ijepa.evaluation.metrics.iou import Confusion
from ijepa.evaluation.segmentation.dataset import Classes, Labels, SegmentationDataset
from ijepa.evaluation.segmentation.protocol import TokenCut
from ijepa.utils.errors import UserError

Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]
"""Top, left, bottom and right in pixels, the last two beyond the box."""

FOUND_IOU = 0.5
"""IoU of two boxes from which on an object counts as found."""

_VOID = 2

_SAME = 1e-9
"""Difference of two eigenvalues, which are in [0, 2], below which they count as a repeated one."""
_TIE = 1e-5
"""Relative difference below which two entries count as equal; rounding leaves 1e-6 if eigenvalues are `_SAME` apart."""


@dataclass
class Found:
    """Scores of images: `iou` of the foreground and `hits` of boxes, only of images with an object."""

    confusion: Confusion
    iou: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)

    def row(self, seed: int) -> dict[str, Any]:
        """Return CorLoc and the mean foreground IoU over images, each with its 95 % interval."""
        if not self.hits:
            return {"corloc": 0.0, "iou_images": 0.0, "with_objects": 0}
        return {
            "corloc": float(np.mean(self.hits)),
            "corloc_ci": list(interval(sum(self.hits), len(self.hits))),
            "iou_images": float(np.mean(self.iou)),
            "iou_images_ci": list(mean_interval(self.iou, seed=seed)),
            "with_objects": len(self.hits),
        }


def cut_set(encoder: PatchEncoder, samples: SegmentationDataset, rule: TokenCut, batch: int) -> Found:
    """Segment every image of a set and score it. All labels except the ground's and ignored ones are foreground.

    Raises:
        UserError: no class is named as ground; and as `SegmentationDataset.read`.
        RunError: as `SegmentationDataset.read`.
    """
    ground = ground_of(samples.classes, rule)
    found = Found(Confusion(2, [_VOID]))
    for patches, masks in samples.patch_features(encoder, batch):
        for features, mask in zip(patches, masks, strict=True):
            side = round(len(features) ** 0.5)
            foreground, seed = cut(features, rule.tau, rule.eps)
            cells = foreground.reshape(side, side)
            predicted = cells.repeat(encoder.patch_size, 0).repeat(encoder.patch_size, 1)
            scored = ~np.isin(mask, samples.classes.ignore)
            truth = ~np.isin(mask, ground) & scored
            found.confusion.add(np.where(scored, truth, _VOID), predicted.astype(np.int64))
            if truth.any():
                found.iou.append(float((truth & predicted).sum() / (truth | (predicted & scored)).sum()))
                box = box_of(cells, seed, encoder.patch_size)
                objects = boxes(np.where(truth, mask + 1, 0))
                found.hits.append(max(box_iou(box, other) for other in objects) >= FOUND_IOU)
    return found


def ground_of(classes: Classes, rule: TokenCut) -> list[int]:
    """Return the numbers of the classes that are ground: by their names, or 0 if they have none.

    Raises:
        UserError: the classes have names, and none of them is a name of the ground.
    """
    if not classes.maps and classes.names == tuple(map(str, range(classes.count))):
        return [0]
    ground = [number for number, name in enumerate(classes.names) if name in rule.ground]
    if not ground:
        problem = (
            f"no class of the masks is named {' or '.join(rule.ground)}; there are {', '.join(classes.names[:3])}, ..."
        )
        raise UserError("--test", problem, "set the names of background classes by the protocol's tokencut.ground")
    return ground


def cut(features: Tensor, tau: float, eps: float) -> tuple[Mask, int]:
    """Return which patches are foreground (N,), and the patch with the largest entry, for features (N, D).

    The vector is the one with the largest entry among the vectors of unit length in the space of the second eigenvalue,
    with the sign that makes this entry positive. Entries that are equal up to rounding count as equal: the first of the
    largest is used, and an entry equal to the mean is not foreground.
    """
    unit = normalize(features.double(), dim=1)
    joined = np.where((unit @ unit.T).numpy() > tau, 1.0, eps)
    space = second_space(joined)
    length = np.linalg.norm(space, axis=1)
    seed = int((length >= (1 - _TIE) * length.max()).argmax())
    vector = space @ space[seed]
    foreground: Mask = vector > vector.mean() + _TIE * vector[seed]
    foreground[seed] = True  # a single patch is equal to the mean
    return foreground, seed


def second_space(joined: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return a basis (N, K) of the solutions of (D - W) v = l D v for the second smallest l; K is 1 in general.

    `joined` (N, N) is W. The basis is orthonormal with respect to D, and its rows are unique up to a rotation.
    """
    scale = 1 / np.sqrt(joined.sum(1))
    values, vectors = np.linalg.eigh(np.eye(len(joined)) - scale[:, None] * joined * scale)
    second = min(1, len(joined) - 1)
    same = np.arange(len(joined)) >= second
    same &= values <= values[second] + _SAME
    return scale[:, None] * vectors[:, same]


def box_of(foreground: Mask, seed: int, patch: int) -> Box:
    """Return the box in pixels of the part of a foreground (h, w) of patches that has patch `seed`."""
    from scipy.ndimage import find_objects, label

    parts, _ = label(foreground)
    rows, columns = find_objects(parts)[parts.flat[seed] - 1]
    return rows.start * patch, columns.start * patch, rows.stop * patch, columns.stop * patch


def boxes(mask: Labels) -> list[Box]:
    """Return the boxes of the connected parts of every label above 0 of a mask (H, W)."""
    from scipy.ndimage import find_objects, label

    found = []
    for number in np.unique(mask[mask > 0]):
        for rows, columns in find_objects(label(mask == number)[0]):
            found.append((rows.start, columns.start, rows.stop, columns.stop))
    return found


def box_iou(a: Box, b: Box) -> float:
    """Return the IoU of two boxes."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, height) * max(0, width)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
