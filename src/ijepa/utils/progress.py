"""How far long work has got, told every few seconds."""

import time
from collections.abc import Callable

_SECONDS = 5.0


class Progress:
    """Tells how much of `total` is done, at what rate, and how long the rest takes; `unit` of them are one `of`."""

    def __init__(
        self, tell: Callable[[str], None], what: str, total: int, of: str = "images", unit: float = 1.0
    ) -> None:
        self.tell, self.what, self.total, self.of, self.unit = tell, what, total, of, unit
        self.begun = self.told = time.monotonic()

    def at(self, done: int) -> None:
        """Say that so much is done; it is told where the last line is seconds old."""
        now = time.monotonic()
        if now - self.told < _SECONDS or not done:
            return
        self.told, rate = now, done / (now - self.begun)
        left = (self.total - done) / rate / 60
        counts = f"{done / self.unit:.0f} of {self.total / self.unit:.0f} {self.of}"
        self.tell(f"{self.what}: {counts}, {rate / self.unit:.0f} a second, {left:.1f} minutes left")
