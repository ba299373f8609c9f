"""Where a step's time and memory go: a trace of a few steps, for people who would rather look than guess.

RUN/profile/step-00000011/ holds for every rank `rank-0.trace.json.gz`, which Perfetto (ui.perfetto.dev) and
chrome://tracing open, and `rank-0.table.txt`, the operations with most time; on a GPU also `rank-0.memory.pickle`,
every allocation of those steps with its stack, for pytorch.org/memory_viz. The parts of a step stand in the trace by
name.

Profiled steps are slower. They compute the same bits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ijepa.utils.errors import RunError, UserError

_ROWS = 60
_ALLOCATIONS = 200_000


@dataclass(frozen=True)
class Window:
    """Which steps are profiled: `first` to `last`, both included, counted from 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "Window":
        """Read `11` or `11-13`.

        Raises:
            UserError: for anything else.
        """
        low, dash, high = text.partition("-")
        try:
            window = cls(int(low), int(high) if dash else int(low))
        except ValueError:
            window = cls(0, 0)
        if not 1 <= window.first <= window.last:
            raise UserError(f"--profile {text}", "is no stretch of steps", "write --profile 11-13")
        return window


class Profile:
    """Profiles one stretch of a run's steps on this rank; does nothing without a window."""

    def __init__(self, window: Window | None, folder: Path, device: torch.device, rank: int = 0) -> None:
        self._window, self._device, self._rank = window, device, rank
        self._folder = folder / f"step-{window.first:08d}" if window else folder
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Begin, if `step` is the window's first (or within it, after a resume)."""
        window = self._window
        if window is None or self._running is not None or not window.first <= step <= window.last:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running.start()

    def after(self, step: int) -> Path | None:
        """End and write, if `step` is the window's last; return the folder then."""
        return self._end() if self._window is not None and step >= self._window.last else None

    def close(self) -> None:
        """End and write what a run that ended within the window has seen."""
        self._end()

    def _end(self) -> Path | None:
        running, self._running = self._running, None
        if running is None:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        running.stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(running)
        except OSError as error:
            raise RunError(f"{self._folder}: cannot be written: {error.strerror}") from None
        return self._folder

    def _write(self, running: Any) -> None:
        name = str(self._folder / f"rank-{self._rank}")
        running.export_chrome_trace(f"{name}.trace.json.gz")
        key = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        Path(f"{name}.table.txt").write_text(running.key_averages().table(sort_by=key, row_limit=_ROWS) + "\n")
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{name}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
