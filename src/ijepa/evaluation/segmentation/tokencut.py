"""One object cut out of an image by the similarity of its patches: TokenCut (Wang et al., arXiv 2202.11539).

Level 0: labels only score. Patches are joined by 1 where their cosine is above `tau` and by `eps` elsewhere. The
second eigenvector of (D - W) v = l D v relaxes the normalised cut of that graph; it is cut at its mean, and the side
with its largest magnitude is foreground. The part of it that is connected to that patch gives the box.

An eigenvector has no sign of its own, a repeated eigenvalue has no eigenvector of its own, and patches with the same
neighbors have equal entries, which differ by rounding only. `cut` decides all three by rule, so that the result does
not depend on the linear algebra library or on the CPU.

The original takes keys of the last attention layer of an encoder trained by DINO; here, as everywhere in this room, it
is the last block's output. Its bilateral refinement of masks is left out, and boxes of objects are made of the masks:
one for each connected part of each class.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn.functional import normalize

from ijepa.evaluation.features.extract import Encoder
from ijepa.evaluation.metrics.accuracy import interval
from ijepa.evaluation.metrics.bootstrap import mean_interval
from ijepa.evaluation.metrics.iou import Confusion
from ijepa.evaluation.segmentation.dataset import Annotated, Classes, Labels, patch_features
from ijepa.evaluation.segmentation.protocol import TokenCut
from ijepa.utils.errors import UserError

Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]
"""Top, left, bottom and right in pixels, the last two beyond the box."""

HALF = 0.5
"""IoU of two boxes at which an object counts as found."""

_VOID = 2

_SAME = 1e-9
"""Difference of two eigenvalues, which lie in [0, 2], below which they count as one that is repeated."""
_TIE = 1e-5
"""Relative difference below which two entries count as equal; rounding leaves 1e-6 if eigenvalues are `_SAME` apart."""


@dataclass
class Found:
    """What was found in the images so far: `iou` of foreground and `hits` of boxes, of images that hold an object."""

    confusion: Confusion
    iou: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)

    def row(self, seed: int) -> dict[str, object]:
        """Return CorLoc and the mean foreground IoU of images, each with its 95 % interval."""
        if not self.hits:
            return {"corloc": 0.0, "iou_images": 0.0, "with_objects": 0}
        return {
            "corloc": float(np.mean(self.hits)),
            "corloc_ci": list(interval(sum(self.hits), len(self.hits))),
            "iou_images": float(np.mean(self.iou)),
            "iou_images_ci": list(mean_interval(self.iou, seed=seed)),
            "with_objects": len(self.hits),
        }


def cut_set(encoder: Encoder, samples: Annotated, classes: Classes, rule: TokenCut, batch: int) -> Found:
    """Cut every image of a set and score it: every label but ground's and the ignored is foreground.

    Raises:
        UserError: no class is called ground; and as `annotated.patch_features`.
        RunError: as `annotated.patch_features`.
    """
    ground = ground_of(classes, rule)
    found = Found(Confusion(2, [_VOID]))
    for patches, masks in patch_features(encoder, samples, classes, batch):
        for features, mask in zip(patches, masks, strict=True):
            side = round(len(features) ** 0.5)
            foreground, seed = cut(features, rule.tau, rule.eps)
            scored = ~np.isin(mask, classes.ignore)
            truth = ~np.isin(mask, ground) & scored
            predicted = enlarged(foreground.reshape(side, side), encoder.patch_size)
            found.confusion.add(np.where(scored, truth, _VOID), predicted.astype(np.int64))
            if truth.any():
                both = (truth & predicted).sum()
                found.iou.append(float(both / (truth | (predicted & scored)).sum()))
                box = box_of(foreground.reshape(side, side), seed, encoder.patch_size)
                found.hits.append(max(overlap(box, other) for other in boxes(np.where(truth, mask + 1, 0))) >= HALF)
    return found


def ground_of(classes: Classes, rule: TokenCut) -> list[int]:
    """Return the numbers of the classes that are ground: by their names, or 0 where they have none.

    Raises:
        UserError: classes with names, and none of them ground.
    """
    if not classes.maps and classes.names == tuple(map(str, range(classes.count))):
        return [0]
    ground = [number for number, name in enumerate(classes.names) if name in rule.ground]
    if not ground:
        problem = f"no class of the masks is called {' or '.join(rule.ground)}, but {', '.join(classes.names[:3])}, ..."
        raise UserError("--test", problem, "name those that are no objects by the protocol's tokencut.ground")
    return ground


def cut(features: Tensor, tau: float, eps: float) -> tuple[Mask, int]:
    """Return which patches are foreground (N,), and the one with the largest entry, for features (N, D).

    Of all vectors of unit length in the second eigenvalue's space, the one with the largest entry is taken, with that
    entry positive. Entries that are equal up to rounding are equal: the first of the largest counts, and an entry
    equal to the mean is not foreground.
    """
    unit = normalize(features.double(), dim=1)
    joined = np.where((unit @ unit.T).numpy() > tau, 1.0, eps)
    space = second_space(joined)
    length = np.linalg.norm(space, axis=1)
    seed = int((length >= (1 - _TIE) * length.max()).argmax())
    vector = space @ space[seed]
    foreground: Mask = vector > vector.mean() + _TIE * vector[seed]
    foreground[seed] = True  # of a single patch, which is its own mean
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
    """Return the box in pixels of the part of a foreground (h, w) of patches that is connected to patch `seed`."""
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


def overlap(a: Box, b: Box) -> float:
    """Return the IoU of two boxes."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, height) * max(0, width)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def enlarged(cells: Mask, patch: int) -> Mask:
    """Return a map of patches (h, w) pixel by pixel."""
    return cells.repeat(patch, 0).repeat(patch, 1)
