"""Multi-block masks the slow way: one image, one block, one patch at a time, from the same random words."""

import math

from ijepa.masking.masks import ATTEMPTS
from ijepa.utils.random import Stream, random_bits


def draw(rule, grid, seed, position):
    """(context patches, list of target blocks' patches), each a sorted list of patch numbers."""
    _height, _width = grid
    count = 4 * (1 + rule.targets)
    for attempt in range(ATTEMPTS):
        numbers = [int(w) for w in random_bits(seed, Stream.MASK, [position], (attempt + 1) * count)[0]][
            attempt * count :
        ]
        block = patches(numbers[:4], rule.context_scale, rule.context_aspect, grid)
        targets = [
            patches(numbers[4 * t : 4 * t + 4], rule.target_scale, rule.target_aspect, grid)
            for t in range(1, 1 + rule.targets)
        ]
        context = block - set().union(*targets)
        if len(context) >= rule.min_context:
            return sorted(context), [sorted(t) for t in targets]
    while len(targets) > 1 and len(context) < rule.min_context:
        targets.pop()
        context = block - set().union(*targets)
    return sorted(context), [sorted(t) for t in targets]


def patches(numbers, scale, aspect, grid):
    height, width = grid
    unit = [n / 2**32 for n in numbers]
    share = scale[0] + (scale[1] - scale[0]) * unit[0]
    ratio = aspect[0] + (aspect[1] - aspect[0]) * unit[1]
    high = min(max(round(height * math.sqrt(share * ratio)), 1), height)
    wide = min(max(round(width * math.sqrt(share / ratio)), 1), width)
    top, left = numbers[2] * (height - high + 1) >> 32, numbers[3] * (width - wide + 1) >> 32
    return {row * width + column for row in range(top, top + high) for column in range(left, left + wide)}
