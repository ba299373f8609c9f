"""Which rank the others wait for: a step takes as long as its slowest rank, and its length does not say whose that is.

Every rank times what it computes without the others, one block of the target encoder (no collective lies within it, and
all ranks give it as many tokens), and how long it waits for data. At each reading of the log, for which the device has
been waited for anyway, the ranks tell one another through the host.
"""

import time
from collections import Counter
from statistics import median
from typing import Any

import torch

from ijepa.distributed.process_group import World
from ijepa.model.ijepa import IJEPA

_SLOW = 1.5
"""Times the others' median from which on a rank is slow."""
_HUNGRY = 0.2
"""Share of a reading's time that a rank waits for data beyond the others' median, from which on it is late with it."""
_READINGS = 3
"""Readings in a row after which that is worth a line."""


class StragglerDetector:
    """Times this rank and compares it with the others. In a world of one it does nothing."""

    def __init__(self, world: World, model: IJEPA, device: torch.device) -> None:
        self._world, self._on_cuda = world, device.type == "cuda"
        self._times: list[tuple[Any, Any]] = []
        self._begun: Any = None
        self._in_a_row: Counter[tuple[str, int]] = Counter()
        if world.size > 1:
            blocks = model.target_encoder.blocks
            block = blocks[len(blocks) // 2]
            # Within FSDP's own hooks, of which the first waits for other ranks' weights.
            block.register_forward_pre_hook(self._begin)
            block.register_forward_hook(self._end, prepend=True)

    def compared(self, seconds: float, waited: float) -> tuple[dict[str, float], list[str]]:
        """Compare all ranks since the last call; every rank calls it, after waiting for its device.

        Args:
            seconds: how long that was.
            waited: how long of it this rank waited for data.

        Returns:
            The slowest rank and how many times the others' median its computing takes, the rank that waits longest
            for data and its share of the time; and on rank 0 a line on each rank that has just been far behind in
            several calls in a row. Both empty in a world of one.
        """
        if self._world.size == 1:
            return {}, []
        computed = sum(self._seconds(*each) for each in self._times)
        self._times.clear()
        every = self._world.all_gather_object((computed, waited / seconds))
        slow = [own / max(others, 1e-9) for own, others in _beside([each for each, _ in every])]
        late = [share for _, share in every]
        slowest, hungriest = slow.index(max(slow)), late.index(max(late))
        figures = {
            "slowest_rank": slowest,
            "slowest_times": round(slow[slowest], 3),
            "hungriest_rank": hungriest,
            "hungriest_wait": round(late[hungriest], 4),
        }
        lines = []
        for rank, (times, (own, others)) in enumerate(zip(slow, _beside(late), strict=True)):
            if self._lasts("slow", rank, times > _SLOW):
                lines.append(f"rank {rank} computes {times:.1f} times as long as the others, who wait for it")
            if self._lasts("late", rank, own - others > _HUNGRY):
                lines.append(
                    f"rank {rank} waits for data {own:.0%} of the time, the others {others:.0%} and then for it"
                )
        return figures, lines if self._world.rank == 0 else []

    def _lasts(self, what: str, rank: int, so: bool) -> bool:
        """Count readings in a row; True at the one from which on it is worth a line."""
        self._in_a_row[what, rank] = self._in_a_row[what, rank] + 1 if so else 0
        return self._in_a_row[what, rank] == _READINGS

    def _begin(self, *_: object) -> None:
        self._begun = self._mark()

    def _end(self, *_: object) -> None:
        self._times.append((self._begun, self._mark()))

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begun: Any, ended: Any) -> float:
        return begun.elapsed_time(ended) / 1e3 if self._on_cuda else ended - begun


def _beside(values: list[float]) -> list[tuple[float, float]]:
    """Each rank's value, and the median of all others'."""
    return [(value, median(values[:rank] + values[rank + 1 :])) for rank, value in enumerate(values)]
