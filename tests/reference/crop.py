"""Random resized crop and the antialiased bilinear filter, by their definitions."""

import math

import numpy as np


def random_resized_crop(
    uniforms: list[list[float]], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width); `uniforms` contains four numbers in [0, 1) for each of ten attempts."""
    for area_share, aspect, down, across in uniforms:
        area = height * width * (scale[0] + area_share * (scale[1] - scale[0]))
        shape = ratio[0] * (ratio[1] / ratio[0]) ** aspect
        w, h = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return math.floor(down * (height - h + 1)), math.floor(across * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def clamped_crop(
    uniforms: list[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of one draw with four numbers in [0, 1), clamped to the sides of the image."""
    area_share, aspect, down, across = uniforms
    area = height * width * (scale[0] + area_share * (scale[1] - scale[0]))
    shape = ratio[0] * (ratio[1] / ratio[0]) ** aspect
    w = min(width, max(1, round((area * shape) ** 0.5)))
    h = min(height, max(1, round((area / shape) ** 0.5)))
    return math.floor(down * (height - h + 1)), math.floor(across * (width - w + 1)), h, w


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) to (h, w, C) in float64 with a triangle as wide as an output pixel, at least one input pixel."""

    def weights(source: int, target: int) -> np.ndarray:
        scale = source / target
        support = max(scale, 1.0)
        center = (np.arange(target)[:, None] + 0.5) * scale
        distance = np.abs(np.arange(source)[None] + 0.5 - center) / support
        triangle = np.maximum(1 - distance, 0)
        return triangle / triangle.sum(axis=1, keepdims=True)

    down, across = weights(image.shape[0], size[0]), weights(image.shape[1], size[1])
    columns = np.tensordot(down, image.astype(np.float64), axes=(1, 0))  # (h, W, C)
    return np.tensordot(across, columns, axes=(1, 1)).transpose(1, 0, 2)
