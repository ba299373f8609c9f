"""CPU time of methods that take turns."""

import time
from collections.abc import Callable, Mapping

import numpy as np


def interleaved(methods: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each method in each round; one more round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            start = time.process_time()
            method()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return each method's median over the rounds."""
    return {name: float(np.median(rounds)) for name, rounds in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """Return the median over rounds of one method's time divided by another's in the same round."""
    return float(np.median(np.array(seconds[numerator]) / np.array(seconds[denominator])))
