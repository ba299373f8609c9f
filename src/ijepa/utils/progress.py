"""Reports on long work: one callback of one line of text, and a meter that calls it every few seconds.

Functions that take long have a parameter `progress: Progress = no_progress`. The command line shows the lines.
"""

import time
from collections.abc import Callable

Progress = Callable[[str], None]
"""Receives one line of text at a time."""

_SECONDS = 5.0
"""Time between two lines."""


def no_progress(line: str) -> None:
    """Report nothing."""


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units: 45s, 12m 5s, 3h 20m, 17d 4h."""
    whole = round(seconds)
    for unit, size, smaller, divisor in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // divisor}{smaller}"
    return f"{whole}s"


class ProgressMeter:
    """Reports how much of `total` is done, the rate, and the time left; at most one line every 5 seconds."""

    def __init__(self, progress: Progress, what: str, total: int, of: str = "images", unit: float = 1.0) -> None:
        """Start the clock.

        Args:
            progress: receives the lines.
            what: the work, at the beginning of each line.
            total: amount of work, in the numbers that `update` gets.
            of: name of the unit that is shown.
            unit: amount of work in one unit that is shown, such as 1e9 bytes in a GB.
        """
        self._progress, self._what, self._total, self._of, self._unit = progress, what, total, of, unit
        self._start = self._reported = time.monotonic()

    def update(self, done: int) -> None:
        """Set the amount of work that is done."""
        now = time.monotonic()
        if now - self._reported < _SECONDS or not done:
            return
        self._reported, rate = now, done / (now - self._start)
        left = (self._total - done) / rate / 60
        counts = f"{done / self._unit:.0f} of {self._total / self._unit:.0f} {self._of}"
        self._progress(f"{self._what}: {counts}, {rate / self._unit:.0f} per second, {left:.1f} minutes left")
