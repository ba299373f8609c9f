"""Which rank the others wait for: a step takes as long as its slowest rank, and its length does not show which one.

Every rank measures what it computes without the others: one block of the target encoder, which contains no collective
and has equally many tokens on all ranks. It also measures how long it waits for data. At each reading of the log, which
waits for the device anyway, the ranks exchange both through the host.
"""

import time
from collections import Counter
from statistics import median
from typing import Any

import torch

from ijepa.distributed.process_group import World
from ijepa.model.ijepa import IJEPA

_SLOW = 1.5
"""A rank is slow if it computes this many times as long as the median of the others."""
_DATA_BOUND = 0.2
"""A rank is data-bound if it waits for data by this share of the time more than the median of the others."""
_READINGS = 3
"""Readings in a row after which a line is printed."""


class StragglerDetector:
    """Times this rank and compares it with the others. On one process it does nothing."""

    def __init__(self, world: World, model: IJEPA, device: torch.device) -> None:
        self._world, self._on_cuda = world, device.type == "cuda"
        self._times: list[tuple[Any, Any]] = []
        self._start: Any = None
        self._in_a_row: Counter[tuple[str, int]] = Counter()
        if world.size > 1:
            blocks = model.target_encoder.blocks
            block = blocks[len(blocks) // 2]
            # FSDP's own hooks wait for other ranks' weights; these two run inside them and exclude that.
            block.register_forward_pre_hook(self._begin)
            block.register_forward_hook(self._end, prepend=True)

    def compare(self, seconds: float, waited: float) -> tuple[dict[str, float], list[str]]:
        """Compare all ranks since the last call; every rank calls it, after waiting for its device.

        Args:
            seconds: time since the last call.
            waited: how much of it this rank waited for data.

        Returns:
            The slowest rank and how many times the others' median it computes; the rank that waits longest for data
            and its share of the time. And on rank 0, a line for each rank that has just been far behind in several
            calls in a row. Both are empty on one process.
        """
        if self._world.size == 1:
            return {}, []
        computed = sum(self._seconds(*each) for each in self._times)
        self._times.clear()
        every = self._world.all_gather_object((computed, waited / seconds))
        slow = [own / max(others, 1e-9) for own, others in _with_others([each for each, _ in every])]
        waits = [share for _, share in every]
        slowest, data_bound = slow.index(max(slow)), waits.index(max(waits))
        figures = {
            "slowest_rank": slowest,
            "slowest_times": round(slow[slowest], 3),
            "data_bound_rank": data_bound,
            "data_bound_wait": round(waits[data_bound], 4),
        }
        lines = []
        for rank, (times, (own, others)) in enumerate(zip(slow, _with_others(waits), strict=True)):
            if self._lasts("slow", rank, times > _SLOW):
                lines.append(f"rank {rank} computes {times:.1f} times as long as the other ranks, which wait for it")
            if self._lasts("data-bound", rank, own - others > _DATA_BOUND):
                lines.append(
                    f"rank {rank} waits for data {own:.0%} of the time; the others {others:.0%}, then for rank {rank}"
                )
        return figures, lines if self._world.rank == 0 else []

    def _lasts(self, what: str, rank: int, present: bool) -> bool:
        """Count readings in a row; return True at the one after which a line is printed."""
        self._in_a_row[what, rank] = self._in_a_row[what, rank] + 1 if present else 0
        return self._in_a_row[what, rank] == _READINGS

    def _begin(self, *_: object) -> None:
        self._start = self._now()

    def _end(self, *_: object) -> None:
        self._times.append((self._start, self._now()))

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        # The host runs ahead of the device, so only events in the device's stream measure its time.
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_cuda else end - start


def _with_others(values: list[float]) -> list[tuple[float, float]]:
    """Return each rank's value and the median of all others' values."""
    return [(value, median(values[:rank] + values[rank + 1 :])) for rank, value in enumerate(values)]
