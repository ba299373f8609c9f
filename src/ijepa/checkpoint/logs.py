"""Logs of a run: files with one JSON object per line, in the order of their `step`.

A log grows to a gigabyte, so nothing here holds a whole file in memory. Text is ASCII, as `json.dumps` writes it.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ijepa.utils.files import atomic_file

_SAMPLED = 2**22
"""Bytes up to which `spread_rows` returns every row; of longer files it reads about as many."""
_PLACES, _TAIL = 1000, 2**16
"""From how many places `spread_rows` reads, and how many bytes at the end of the file without a gap."""


def truncate_log(file: Path, step: int, *, every_step: bool = False, repeats: bool = False) -> str:
    """Truncate a log to `step`, remove damaged lines, and return what is wrong with it in one line, "" if nothing is.

    Rows after a damaged line stay. The end is cut off in place; if lines are removed, a new file replaces the old one.

    Args:
        file: the log; a missing file counts as empty.
        step: the last step whose rows stay.
        every_step: whether the log has a row for each step from 1 on; else it has one for `step`, unless that is 0.
        repeats: whether a step may have several rows, or none.

    Raises:
        OSError: the disk is full or fails; the file is then unchanged.
    """
    missing: list[tuple[int, int]] = []
    last = kept = rows = damaged = 0
    if file.exists():
        with file.open("r+b") as log:
            lines = _Lines(log, step)
            for line, at in _in_order(lines, repeats):
                if every_step and at > last + 1:
                    missing.append((last + 1, at - 1))
                last, kept, rows = at, kept + len(line), rows + 1
            damaged = lines.number - rows
            # Either lines in between are damaged, or the sound rows are exactly the beginning of the file.
            if kept < lines.end:
                log.seek(0)
                with atomic_file(file) as out:
                    out.writelines(line for line, _ in _in_order(_Lines(log, step), repeats))
            elif kept < lines.size:
                # A crash leaves the old length or the new one, and the next resume truncates again.
                log.truncate(kept)
                os.fsync(log.fileno())
    if every_step and last < step:
        missing.append((last + 1, step))
    problems = []
    if damaged:
        problems.append(f"{damaged} damaged or misplaced line{'s' * (damaged > 1)} removed")
    if missing:
        problems.append(_describe_gaps(missing))
    if not every_step and not repeats and last < step:
        problems.append(f"rows after step {last} up to step {step} are missing")
    return f"{file}: {'; '.join(problems)}" if problems else ""


def _describe_gaps(missing: list[tuple[int, int]]) -> str:
    ranges = ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in missing[:5])
    if len(missing) == 1 and missing[0][0] == missing[0][1]:
        return f"step {ranges} is missing"
    more = f" and {len(missing) - 5}more ranges" if len(missing) > 5 else ""
    return f"steps {ranges}{more} are missing"


def count_rows(file: Path, step: int) -> int:
    """Return how many rows of a log are of `step`."""
    if not file.exists():
        return 0
    with file.open("rb") as log:
        return sum(_step(line) == step for line in log)


def spread_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, or about 4 MB of them from places spread evenly over a longer one, in their order.

    The first and the last rows are always among them. Damaged lines are left out, and so is a last line without its
    end, which is still being written.
    """
    if not file.is_file():
        return []
    with file.open("rb", buffering=0) as log:
        return list(sample_rows(log))


def sample_rows(log: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of an open unbuffered log; see `spread_rows`."""
    size = log.seek(0, os.SEEK_END)
    spans = [(0, size)]
    if size > _SAMPLED:
        length, stride = (_SAMPLED - _TAIL) // _PLACES, (size - _TAIL) // _PLACES
        spans = [(number * stride, length) for number in range(_PLACES)] + [(size - _TAIL, _TAIL)]
    for start, length in spans:
        log.seek(start)
        lines = _read_exactly(log, length).splitlines(keepends=True)
        for line in lines[1 if start else 0 :]:  # the first line of a later span is incomplete
            row = row_of(line)
            if row is not None:
                yield row


def row_of(line: bytes) -> dict[str, Any] | None:
    """Return the object of a complete line, None if the line is damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and row else None


def _read_exactly(log: Any, length: int) -> bytes:
    """Read `length` bytes, fewer at the end of the file; one unbuffered read may return less than that."""
    data = b""
    while len(data) < length and (more := log.read(length - len(data))):
        data += more
    return data


def _step(line: bytes) -> int | None:
    """Return the step of a row, None if the line is damaged."""
    row = row_of(line)
    step = row.get("step") if row else None
    return step if type(step) is int and step >= 0 else None  # `True` is an int too


class _Lines:
    """The lines of a log that hold a row of at most `step`, with their steps.

    Attributes:
        number: lines up to the last row that was yielded, damaged ones included.
        end: bytes up to there.
        size: bytes read.
    """

    def __init__(self, log: BinaryIO, step: int) -> None:
        self._log, self._limit = log, step
        self.number = self.end = self.size = 0

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        for number, line in enumerate(self._log, 1):
            self.size += len(line)
            step = _step(line)
            if step is not None and step <= self._limit:
                self.number, self.end = number, self.size
                yield line, step


def _in_order(lines: Iterable[tuple[bytes, int]], repeats: bool) -> Iterator[tuple[bytes, int]]:
    """Leave out rows that are out of order.

    These are later rows of a step that has been there, and rows whose step exceeds that of the next row, as a damaged
    number may.
    """
    # A row is held back until the next one shows that its step is plausible.
    held, last = None, -1
    for line, step in lines:
        if step < last or (step == last and not repeats):
            continue
        if held is not None and step < held[1]:
            held = line, step
        elif held is None or step > held[1] or repeats:
            if held is not None:
                yield held
                last = held[1]
            held = line, step
    if held is not None:
        yield held
