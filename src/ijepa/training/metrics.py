"""What a run writes about itself: metrics that the seed determines, timings that it does not, and a progress line.

A step hands its values over as device tensors; they are read together, once every `log_every` steps, so that no step
waits for one. All files are flushed with every reading and are made durable before every checkpoint, so that a
checkpoint of step n always finds the metrics of all steps up to n beside it; a resume cuts off what came after.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from ijepa.checkpoint.logs import cut_log, rows_at_end
from ijepa.checkpoint.run_dir import Run
from ijepa.distributed.stragglers import StragglerDetector
from ijepa.training.schedules import Rates
from ijepa.utils.errors import RunError
from ijepa.utils.files import fsync_path
from ijepa.utils.output import Output
from ijepa.utils.progress import duration

VALUES = ("loss", "skill", "grad_norm", "target_std", "void", "replaced")
"""What a step hands over as one device tensor, in this order."""


@dataclass(frozen=True)
class StepRecord:
    """One step, as the loop hands it over: `values` (len(VALUES),) float32 on the device."""

    step: int
    epoch: float
    rates: Rates
    values: Tensor
    images: int
    flops: float
    waited: float
    """Seconds spent waiting for data."""


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
        pace: StragglerDetector | None = None,
    ) -> None:
        self.total, self.log_every, self._pace = total, log_every, pace
        self._folder, self._rank = run.folder, rank
        self._pending: list[StepRecord] = []
        files = (run.metrics_file, run.timings_file, run.diagnostics_file)
        # Ranks other than 0 read the same values, to act on them alike; they write nothing.
        self._metrics, self._timings, self._diagnostics = (
            (file if rank == 0 else Path(os.devnull)).open("a") for file in files
        )
        self._clock = time.perf_counter()
        self._begun, self._start = self._clock, start
        self._paused = 0.0
        self._show: _Quiet
        self._output = Output(sys.stdout)
        if quiet or rank:
            self._show = _Quiet() if quiet else _Other(self._output, rank)
        else:
            self._show = _Bar(total, start, self._output) if self._output.isatty() else _Lines(self._output)

    @property
    def output_lost(self) -> int:
        """The errno with which a write to standard output failed; 0 if none did. Nothing is shown any more then."""
        return self._output.lost

    def add(self, record: StepRecord) -> bool:
        """Take a step; return whether a reading, `flush`, is due."""
        self._pending.append(record)
        return record.step % self.log_every == 0 or record.step == self.total

    def flush(self) -> list[dict[str, Any]]:
        """Read what is pending off the device, write it, show it, and return its metrics. Every rank calls it."""
        return self._flush(self._pace)

    def _flush(self, pace: StragglerDetector | None) -> list[dict[str, Any]]:
        if not self._pending:
            return []
        values = torch.stack([record.values for record in self._pending]).tolist()
        rows = [
            _metrics(record, dict(zip(VALUES, row, strict=True)))
            for record, row in zip(self._pending, values, strict=True)
        ]
        now = time.perf_counter()
        seconds = max(now - self._clock - self._paused, 1e-9)
        last, waited = self._pending[-1], sum(r.waited for r in self._pending)
        ranks, lines = pace.compared(seconds, waited) if pace else ({}, [])
        timing = {
            "step": last.step,
            "seconds": round(seconds, 4),
            "images_per_second": round(sum(r.images for r in self._pending) / seconds, 2),
            "data_wait": round(waited / seconds, 4),
            "tflops": round(sum(r.flops for r in self._pending) / seconds / 1e12, 4),
            "memory": _peak_memory(last.values.device),
            **ranks,
        }
        _append(self._metrics, rows)
        _append(self._timings, [timing])
        left = (now - self._begun) / max(last.step - self._start, 1) * (self.total - last.step)
        self._show.step(rows[-1], timing, self.total, left)
        for line in lines:
            self.say(line)
        self._pending.clear()
        self._clock, self._paused = now, 0.0
        return rows

    def diagnose(self, step: int, measure: Callable[[], dict[str, float]]) -> None:
        """Take a callback's measurement after `step`; its time counts as no step's."""
        begun = time.perf_counter()
        _append(self._diagnostics, [{"step": step, **measure()}])
        self._paused += time.perf_counter() - begun

    def sync(self) -> int:
        """Make what is written durable, as a checkpoint must not outlive its metrics; return the metrics' bytes.

        Raises:
            RunError: the disk refuses.
        """
        try:
            if self._rank == 0:
                for file in (self._metrics, self._timings, self._diagnostics):
                    os.fsync(file.fileno())
                fsync_path(self._folder)
            return os.fstat(self._metrics.fileno()).st_size
        except OSError as error:
            raise RunError(f"{self._folder}: logs cannot be written: {error.strerror}") from None

    def say(self, line: str) -> None:
        """Show one line of text, above the bar where there is one."""
        self._show.say(line)

    def close(self) -> None:
        """Close the files and the bar; pending records are written first, without asking other ranks."""
        try:
            self._flush(None)
        finally:
            for file in (self._metrics, self._timings, self._diagnostics):
                with suppress(OSError):  # what a full disk did not take has been complained of when it was written
                    file.close()
            self._show.close()


def cut_back(run: Run, step: int, metrics_bytes: int | None = None) -> tuple[int, list[str]]:
    """Cut all three files back to `step`: what a killed run wrote after its last checkpoint is written again.

    `metrics_bytes` is the size of the metrics file when `step` was saved, None if it is not known.

    Returns:
        How many measurements after `step` itself are kept; a kill may have cut off others. And a line for each file
        from which rows are missing or damaged lines were taken out.

    Raises:
        RunError: when the disk refuses; the file named is as it was.
    """
    logs: dict[Path, dict[str, Any]] = {
        run.metrics_file: {"every_step": True, "expected": metrics_bytes},
        run.timings_file: {},
        run.diagnostics_file: {"repeats": True},
    }
    said = []
    for file, form in logs.items():
        try:
            said.append(cut_log(file, step, **form))
        except OSError as error:
            raise RunError(f"{file}: cannot be cut back to step {step}: {error.strerror}") from None
    return rows_at_end(run.diagnostics_file, step), [line for line in said if line]


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
    # JSON has no NaN: a value that is not finite is null, and the step says that it was void.
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
    """Peak bytes: allocated on a CUDA device, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(row: dict[str, Any], timing: dict[str, Any], total: int, left: float) -> str:
    """Return the progress line of one reading."""

    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    return (
        f"step {row['step']}/{total}  loss {number('loss', '.4f')}  skill {number('skill', '.3f')}  "
        f"grad {number('grad_norm', '.3g')}  lr {row['lr_encoder']:.2e}  {timing['images_per_second']:.0f} img/s  "
        f"{timing['tflops']:.2f} TFLOP/s  {timing['memory'] / 2**30:.1f} GiB  data {timing['data_wait']:.0%}  "
        f"left {duration(left)}"
    )


class _Quiet:
    def step(self, row: dict[str, Any], timing: dict[str, Any], total: int, left: float) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


class _Lines(_Quiet):
    """Plain lines, for logs."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def step(self, row: dict[str, Any], timing: dict[str, Any], total: int, left: float) -> None:
        self.say(describe(row, timing, total, left))

    def say(self, line: str) -> None:
        print(line, file=self._output, flush=True)


class _Other(_Quiet):
    """A rank that is not the first: what only it knows, and nothing else."""

    def __init__(self, output: Output, rank: int) -> None:
        self._output, self._rank = output, rank

    def say(self, line: str) -> None:
        print(f"rank {self._rank}: {line}", file=self._output, flush=True)


class _Bar(_Quiet):
    """A live bar with the latest reading under it, for terminals."""

    def __init__(self, total: int, start: int, output: Output) -> None:
        columns = (BarColumn(bar_width=None), TextColumn("{task.description}"))
        # It is one now. Asked again, one that has been closed is none, and rich would write to it no more.
        console = Console(file=cast(TextIO, output), force_terminal=True)
        self._progress = Progress(*columns, console=console, refresh_per_second=4, expand=True)
        self._task = self._progress.add_task("starting", total=total, completed=start)
        self._progress.start()

    def step(self, row: dict[str, Any], timing: dict[str, Any], total: int, left: float) -> None:
        self._progress.update(self._task, completed=row["step"], description=describe(row, timing, total, left))

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()
