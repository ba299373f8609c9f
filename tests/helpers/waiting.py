"""Waiting for other processes."""

import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 600.0
"""Seconds to wait for another process: enough for any machine, so that only a hang reaches it."""


def wait_until(condition: Callable[[], bool], running: Callable[[], bool] = lambda: True) -> None:
    """Return once `condition` holds; fail once `running` does not hold, or after LIMIT."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert running() or condition(), "the process ended first"
        assert time.monotonic() < end, f"not within {LIMIT:.0f} seconds"
        time.sleep(0.01)


def count_lines(file: Path) -> int:
    """Return the number of complete lines of a file, 0 where there is none."""
    return file.read_bytes().count(b"\n") if file.exists() else 0
