"""Coverage of one instance, pixel by pixel, from the plain formula: the slow version of the table lookup."""

import math

import numpy as np

from ijepa.prepare.scenes.shapes import signed_distance


def coverage(name: str, size: int, center: tuple[float, float], unit: float, angle: float) -> np.ndarray:
    """Return (size, size) coverage in [0, 1] of a shape of area unit^2 pixels, turned by `angle`, at center x, y."""
    result = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            dx, dy = column + 0.5 - center[0], row + 0.5 - center[1]
            x = (math.cos(angle) * dx + math.sin(angle) * dy) / unit
            y = (math.cos(angle) * dy - math.sin(angle) * dx) / unit
            distance = float(signed_distance(name, np.array([x]), np.array([y]))[0])
            result[row, column] = min(max(0.5 - distance * unit, 0), 1)
    return result
