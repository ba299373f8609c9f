"""What a run shows while it trains: a bar on a terminal, lines elsewhere, nothing if it is quiet.

Displays are logging handlers: the messages of `ijepa.training` go through them while a run is open, because only the
bar can print a line above itself.
"""

import logging
import sys
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ijepa.utils.output import Output
from ijepa.utils.progress import duration

_LOG = logging.getLogger("ijepa.training")


class Display(logging.Handler):
    """Shows messages as lines and no readings; the display of ranks other than 0, for what only they know."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__(logging.INFO)
        self.output, self._prefix = Output(sys.stdout), prefix
        self._before = _LOG.level, _LOG.propagate
        _LOG.setLevel(logging.INFO)
        _LOG.propagate = False  # the command line's handler would print each line again
        _LOG.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message."""
        self.write(self._prefix + record.getMessage())

    def write(self, line: str) -> None:
        """Show a line."""
        print(line, file=self.output, flush=True)

    def show(self, row: dict[str, Any], timing: dict[str, Any], total: int, left: float) -> None:
        """Show a reading; see `describe`."""

    def close(self) -> None:
        """Show nothing any more."""
        if self in _LOG.handlers:
            _LOG.removeHandler(self)
            level, _LOG.propagate = self._before
            _LOG.setLevel(level)
        super().close()


class _Lines(Display):
    """Shows each reading as a line, for files and pipes."""

    def show(self, row: dict[str, Any], timing: dict[str, Any], total: int, left: float) -> None:
        self.write(describe(row, timing, total, left))


class _Bar(Display):
    """Shows a bar with the latest reading under it, for terminals."""

    def __init__(self, total: int, start: int) -> None:
        super().__init__()
        columns = (BarColumn(bar_width=None), TextColumn("{task.description}"))
        # rich asks for each write whether this is a terminal. Once the terminal is closed, it would stop writing, and
        # the run would not notice that its output is lost.
        console = Console(file=cast(TextIO, self.output), force_terminal=True)
        self._progress = Progress(*columns, console=console, refresh_per_second=4, expand=True)
        self._task = self._progress.add_task("starting", total=total, completed=start)
        self._progress.start()

    def write(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False)

    def show(self, row: dict[str, Any], timing: dict[str, Any], total: int, left: float) -> None:
        self._progress.update(self._task, completed=row["step"], description=describe(row, timing, total, left))

    def close(self) -> None:
        self._progress.stop()
        super().close()


def open_display(rank: int, total: int, start: int) -> Display:
    """Return the display of a run of `total` steps that continues after step `start`."""
    if rank:
        return Display(f"rank {rank}: ")
    return _Bar(total, start) if sys.stdout is not None and sys.stdout.isatty() else _Lines()


def describe(row: dict[str, Any], timing: dict[str, Any], total: int, left: float) -> str:
    """Return the progress line of a reading.

    Args:
        row: the last step's row of `metrics.jsonl`.
        timing: the reading's row of `timings.jsonl`.
        total: steps of the run.
        left: seconds until its end.
    """

    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    return (
        f"step {row['step']}/{total}  loss {number('loss', '.4f')}  skill {number('skill', '.3f')}  "
        f"grad {number('grad_norm', '.3g')}  lr {row['lr_encoder']:.2e}  {timing['images_per_second']:.0f} img/s  "
        f"{timing['tflops']:.2f} TFLOP/s  {timing['memory'] / 2**30:.1f} GiB  data {timing['data_wait']:.0%}  "
        f"left {duration(left)}"
    )
