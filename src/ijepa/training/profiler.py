"""Where a step's time and memory go: a trace of a few steps.

RUN/profile/step-00000011/ holds for every rank `rank-0.trace.json.gz`, which Perfetto (ui.perfetto.dev) and
chrome://tracing open, and `rank-0.table.txt`, the operations with the most time. On a GPU it also holds
`rank-0.memory.pickle` for pytorch.org/memory_viz: every allocation of those steps with its stack. The parts of a step
are named in the trace.

Profiled steps are slower, and compute the same bits.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ijepa.utils.errors import UserError
from ijepa.utils.files import write_errors

_LOG = logging.getLogger(__name__)
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
            raise UserError(f"--profile {text}", "is not a range of steps", "write --profile 11-13")
        return window


class Profile:
    """Profiles one range of a run's steps on this rank; does nothing without a window."""

    def __init__(self, window: Window | None, folder: Path, device: torch.device, rank: int = 0) -> None:
        self._window, self._device, self._rank = window, device, rank
        self._folder = folder / f"step-{window.first:08d}" if window else folder
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Start, if `step` is the window's first one (or inside it, after a resume)."""
        window = self._window
        if window is None or self._profile is not None or not window.first <= step <= window.last:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def after(self, step: int) -> None:
        """Stop and write the files, if `step` is the window's last one."""
        if self._profile is not None and self._window is not None and step >= self._window.last:
            self.close()
            _LOG.info("profile: %s", self._folder)

    def close(self) -> None:
        """Stop and write the files, also if the run ends inside the window.

        Raises:
            RunError: the files cannot be written.
        """
        running, self._profile = self._profile, None
        if running is None:
            return
        on_cuda = self._device.type == "cuda"
        if on_cuda:  # the trace ends with the work of the last step
            torch.cuda.synchronize(self._device)
        running.stop()
        with write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            name = str(self._folder / f"rank-{self._rank}")
            running.export_chrome_trace(f"{name}.trace.json.gz")
            key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
            Path(f"{name}.table.txt").write_text(running.key_averages().table(sort_by=key, row_limit=_ROWS) + "\n")
            if on_cuda:
                torch.cuda.memory._dump_snapshot(f"{name}.memory.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
