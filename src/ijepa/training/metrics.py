"""What a run writes about itself: metrics that the seed determines, timings that it does not, and measurements.

A step returns its values as device tensors. They are read together, every `log_every` steps, so that no step waits for
one. All files are flushed at every reading and made durable before every checkpoint, so a checkpoint of step n always
finds the metrics of all steps up to n. A resume truncates the files to its checkpoint.
"""

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ijepa.checkpoint.logs import count_rows, truncate_log
from ijepa.checkpoint.run_dir import Run
from ijepa.distributed.stragglers import StragglerDetector
from ijepa.training.progress import open_display
from ijepa.training.schedules import Rates
from ijepa.utils.errors import RunError
from ijepa.utils.files import fsync_path

_LOG = logging.getLogger(__name__)

VALUES = ("loss", "skill", "grad_norm", "target_std", "void", "replaced")
"""The values of a step's device tensor, in this order."""


@dataclass(frozen=True)
class StepRecord:
    """One step; `values` (len(VALUES),) float32 is on the device."""

    step: int
    epoch: float
    rates: Rates
    values: Tensor
    images: int
    flops: float
    waited: float
    """Seconds of waiting for data."""


class Monitor:
    """Collects step records, and writes and shows them every `log_every` steps."""

    def __init__(
        self,
        run: Run,
        *,
        total: int,
        start: int,
        log_every: int,
        quiet: bool = False,
        rank: int = 0,
        stragglers: StragglerDetector | None = None,
    ) -> None:
        self.total, self.log_every, self._stragglers = total, log_every, stragglers
        self._folder, self._rank = run.folder, rank
        self._pending: list[StepRecord] = []
        files = (run.metrics_file, run.timings_file, run.diagnostics_file)
        # All ranks read the same values, so that they act alike; only rank 0 writes them. It appends, because a resume
        # has truncated the files.
        self._metrics, self._timings, self._diagnostics = self._files = [
            (file if rank == 0 else Path(os.devnull)).open("a") for file in files
        ]
        self._clock = self._begun = time.perf_counter()
        self._start, self._paused = start, 0.0
        self._display = None if quiet else open_display(rank, total, start)

    @property
    def output_lost(self) -> int:
        """The errno of the failed write to standard output, after which nothing is shown; 0 if none failed."""
        return self._display.output.lost if self._display is not None else 0

    def add(self, record: StepRecord) -> bool:
        """Take a step; return whether it is time to call `flush`."""
        self._pending.append(record)
        return record.step % self.log_every == 0 or record.step == self.total

    def flush(self) -> list[dict[str, Any]]:
        """Read pending records off the device, write and show them, and return their rows. Every rank calls it."""
        return self._flush(self._stragglers)

    def _flush(self, stragglers: StragglerDetector | None) -> list[dict[str, Any]]:
        if not self._pending:
            return []
        # (steps, values): one copy from the device for all pending steps.
        values = torch.stack([record.values for record in self._pending]).tolist()
        rows = [
            _metrics(record, dict(zip(VALUES, row, strict=True)))
            for record, row in zip(self._pending, values, strict=True)
        ]
        now = time.perf_counter()
        seconds = max(now - self._clock - self._paused, 1e-9)
        last, waited = self._pending[-1], sum(record.waited for record in self._pending)
        ranks, lines = stragglers.compare(seconds, waited) if stragglers else ({}, [])
        timing = {
            "step": last.step,
            "seconds": round(seconds, 4),
            "images_per_second": round(sum(record.images for record in self._pending) / seconds, 2),
            "data_wait": round(waited / seconds, 4),
            "tflops": round(sum(record.flops for record in self._pending) / seconds / 1e12, 4),
            "memory": _peak_memory(last.values.device),
            **ranks,
        }
        _append(self._metrics, rows)
        _append(self._timings, [timing])
        if self._display is not None:
            left = (now - self._begun) / max(last.step - self._start, 1) * (self.total - last.step)
            self._display.show(rows[-1], timing, self.total, left)
        for line in lines:
            _LOG.info(line)
        self._pending.clear()
        self._clock, self._paused = now, 0.0
        return rows

    def diagnose(self, step: int, measure: Callable[[], dict[str, float]]) -> None:
        """Write a callback's measurement after `step`; its time does not count as a step's."""
        begun = time.perf_counter()
        _append(self._diagnostics, [{"step": step, **measure()}])
        self._paused += time.perf_counter() - begun

    def sync(self) -> None:
        """Make the files durable, because a checkpoint must not outlive its metrics.

        Raises:
            RunError: the disk is full or fails.
        """
        if self._rank != 0:
            return
        try:
            for file in self._files:
                os.fsync(file.fileno())
            fsync_path(self._folder)
        except OSError as error:
            raise RunError(f"{self._folder}: logs cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Write pending records without other ranks, and close the files and the display."""
        try:
            self._flush(None)  # other ranks may have ended, so this must not exchange anything
        finally:
            for file in self._files:
                with suppress(OSError):  # a full disk has been reported when it was written to
                    file.close()
            if self._display is not None:
                self._display.close()


def truncate_logs(run: Run, step: int) -> tuple[int, list[str]]:
    """Truncate all three files to `step`: the resumed run writes again what came after its checkpoint.

    Returns:
        How many measurements after `step` itself are kept, because a kill may have cut off others. And a line for each
        file that lacks rows or from which damaged lines were removed.

    Raises:
        RunError: the disk is full or fails; the named file is unchanged.
    """
    logs: dict[Path, dict[str, Any]] = {
        run.metrics_file: {"every_step": True},
        run.timings_file: {},
        run.diagnostics_file: {"repeats": True},
    }
    lines = []
    for file, form in logs.items():
        try:
            lines.append(truncate_log(file, step, **form))
        except OSError as error:
            raise RunError(f"{file}: cannot be cut back to step {step}: {error.strerror}") from None
    return count_rows(run.diagnostics_file, step), [line for line in lines if line]


def _metrics(record: StepRecord, values: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": record.step,
        "epoch": round(record.epoch, 6),
        "loss": values["loss"],
        "skill": values["skill"],
        "lr_encoder": record.rates.lr_encoder,
        "lr_predictor": record.rates.lr_predictor,
        "weight_decay": record.rates.weight_decay,
        "momentum": record.rates.momentum,
        "grad_norm": values["grad_norm"],
        "target_std": values["target_std"],
    }
    # JSON has no NaN: a value that is not finite becomes null, and the row has "void".
    row = {key: value if value - value == 0 else None for key, value in row.items()}
    replaced = int(values["replaced"])
    return row | ({"void": True} if values["void"] else {}) | ({"replaced": replaced} if replaced else {})


def _append(file: TextIO, rows: list[dict[str, Any]]) -> None:
    try:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        file.flush()
    except OSError as error:
        raise RunError(f"{file.name}: cannot be written: {error.strerror}") from None


def _peak_memory(device: torch.device) -> int:
    """Return peak bytes: allocated on a CUDA device, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
