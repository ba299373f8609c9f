"""The shape that schedules of training and of evaluation share."""

from math import cos, pi


def half_cosine(progress: float) -> float:
    """Return a factor that falls from 1 at progress 0 to 0 at progress 1 along half a cosine."""
    return 0.5 * (1 + cos(pi * progress))
