"""J and F of a predicted mask, as in the DAVIS benchmark (Perazzi et al., CVPR 2016).

J is the IoU of the regions. F is the harmonic mean of precision and recall of the contours: a contour pixel is correct
if the other contour has a pixel within 0.008 of the image diagonal.
"""

import math

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

TOLERANCE = 0.008


def region(predicted: Mask, truth: Mask) -> float:
    """Return J, the IoU of two masks (H, W); 1 if both are empty."""
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else 1.0


def contour(predicted: Mask, truth: Mask, tolerance: float = TOLERANCE) -> float:
    """Return F of the contours of two masks (H, W); 1 if neither has a contour."""
    from scipy.ndimage import distance_transform_edt

    ours, theirs = boundary(predicted), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    # The benchmark dilates a contour by a disk; a distance of at most its radius is the same.
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    precision = (distance_transform_edt(~theirs)[ours] <= radius).mean()
    recall = (distance_transform_edt(~ours)[theirs] <= radius).mean()
    both = precision + recall
    return float(2 * precision * recall / both) if both else 0.0


def boundary(mask: Mask) -> Mask:
    """Return the pixels of (H, W) that differ from their right, lower, or lower right neighbor."""
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = wide[:-1, :-1]
    return (here ^ wide[:-1, 1:]) | (here ^ wide[1:, :-1]) | (here ^ wide[1:, 1:])
