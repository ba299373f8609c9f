"""J and F of a mask against the truth, as the DAVIS benchmark defines them (Perazzi et al., CVPR 2016).

J is the IoU of the regions, F the harmonic mean of precision and recall of their contours, where a contour pixel is
right if one of the other contour lies within a tolerance of .008 of the image's diagonal.
"""

import math

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

TOLERANCE = 0.008


def region(predicted: Mask, truth: Mask) -> float:
    """Return J, the IoU of two masks (H, W); 1 where both are empty."""
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else 1.0


def contour(predicted: Mask, truth: Mask, tolerance: float = TOLERANCE) -> float:
    """Return F of the contours of two masks (H, W); 1 where neither has one."""
    from scipy.ndimage import distance_transform_edt

    ours, theirs = boundary(predicted), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    # "Within a disk of this radius" is "no farther than it": a distance transform does what a dilation would.
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    precision = (distance_transform_edt(~theirs)[ours] <= radius).mean()
    recall = (distance_transform_edt(~ours)[theirs] <= radius).mean()
    both = precision + recall
    return float(2 * precision * recall / both) if both else 0.0


def boundary(mask: Mask) -> Mask:
    """Return the pixels of (H, W) that differ from their right, lower, or lower right neighbour."""
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = wide[:-1, :-1]
    return (here ^ wide[:-1, 1:]) | (here ^ wide[1:, :-1]) | (here ^ wide[1:, 1:])
