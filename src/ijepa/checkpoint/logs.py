"""Logs of a run: files of one JSON object a line, with a `step`, in the order of steps.

They grow to a gigabyte, so nothing here holds a whole file in memory: a file is cut from its end, read in blocks, or
read at places spread evenly over it. Text is ASCII, as `json.dumps` writes it.
"""

import json
import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from ijepa.utils.files import atomic_file

_BLOCK = 2**20
"""Bytes read at a time."""

_READ_WHOLE = 2**24
"""Bytes up to which every line is checked at a resume; of longer files, see `cut_log`."""

_SAMPLED = 2**22
"""Bytes up to which `spread_rows` returns every row; of longer files it reads about as many."""

_PLACES, _TAIL = 1000, 2**16
"""From how many places `spread_rows` reads, and how many bytes at the end of the file without a gap."""


def cut_log(
    file: Path, step: int, *, every_step: bool = False, repeats: bool = False, expected: int | None = None
) -> str:
    """Cut a log back to `step`, take out damaged lines, and return what is wrong with it in one line, "" if nothing is.

    Rows after a damaged line stay. Every line of a file of at most 16 MB is checked. In a longer file only the end is
    checked, unless the file has bytes that JSON does not have or another size than `expected`; then every line is
    checked too. Cutting the end off changes the file in place. If lines are taken out, a new file replaces the old one.

    Args:
        file: the log; a file that is missing counts as empty.
        step: the last step whose rows stay.
        every_step: whether the log has a row for each step from 1 on; else it has one for `step`, unless that is 0.
        repeats: whether a step may have several rows, or none.
        expected: the file's size when `step` was the last one, if known.

    Raises:
        OSError: the disk refuses; the file is then as it was.
    """
    if not file.exists():
        return _lost(file, 0, [(1, step)] if every_step and step else [], None if repeats or every_step else (0, step))
    with file.open("r+b") as log:
        size = log.seek(0, os.SEEK_END)
        end, last = _end(log, step)
        if end > _READ_WHOLE and (end == expected or not every_step) and _is_plain(log, end):
            _truncate(log, end, size)
            return _lost(file, 0, [], None if repeats else (last, step))
        last, kept, lines, missing = 0, 0, 0, []
        for line, at in _sound(log, end, step, repeats):
            if every_step and at > last + 1:
                missing.append((last + 1, at - 1))
            last, kept, lines = at, kept + len(line), lines + 1
        if every_step and last < step:
            missing.append((last + 1, step))
        damaged = _count_lines(log, end) - lines
        if kept == end:
            _truncate(log, end, size)
        else:
            with atomic_file(file) as out:
                out.writelines(line for line, _ in _sound(log, end, step, repeats))
    return _lost(file, damaged, missing, None if repeats or every_step else (last, step))


def _lost(file: Path, damaged: int, missing: list[tuple[int, int]], last: tuple[int, int] | None) -> str:
    """Return in one line what a log lacks."""
    said = []
    if damaged:
        said.append(f"{damaged} damaged or misplaced line{'s' * (damaged > 1)} taken out")
    if missing:
        ranges = ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in missing[:5])
        more = f" and {len(missing) - 5} more gaps" if len(missing) > 5 else ""
        one = len(missing) == 1 and missing[0][0] == missing[0][1]
        said.append(f"step {ranges} is missing" if one else f"steps {ranges}{more} are missing")
    if last is not None and last[0] < last[1]:
        said.append(f"rows after step {last[0]} up to step {last[1]} are missing")
    return f"{file}: {'; '.join(said)}" if said else ""


def spread_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, or about 4 MB of them from places spread evenly over a longer one, in their order.

    The first rows and the last ones are always among them. Damaged lines are left out, and a last line without its
    end, which is still being written.
    """
    if not file.is_file():
        return []
    with file.open("rb", buffering=0) as log:
        return list(_spread(log))


def rows_at_end(file: Path, step: int) -> int:
    """Return how many rows at the end of a log are of `step`."""
    if not file.exists():
        return 0
    with file.open("rb") as log:
        return sum(1 for _ in takewhile(lambda found: _step(found[0]) == step, _backwards(log)))


def row_of(line: bytes) -> dict[str, Any] | None:
    """Return the object that a whole line holds, None where the line is damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and row else None


def _spread(log: Any) -> Iterator[dict[str, Any]]:
    size = log.seek(0, os.SEEK_END)
    spans = [(0, size)]
    if size > _SAMPLED:
        length, stride = (_SAMPLED - _TAIL) // _PLACES, (size - _TAIL) // _PLACES
        spans = [(number * stride, length) for number in range(_PLACES)] + [(size - _TAIL, _TAIL)]
    for start, length in spans:
        log.seek(start)
        lines = _exactly(log, length).splitlines(keepends=True)
        for line in lines[1 if start else 0 :]:  # the first began before
            row = row_of(line)
            if row is not None:
                yield row


def _exactly(log: Any, length: int) -> bytes:
    """Read `length` bytes, fewer at the end of the file; an unbuffered read may return less than was asked for."""
    data = b""
    while len(data) < length and (more := log.read(length - len(data))):
        data += more
    return data


def _step(line: bytes) -> int | None:
    """Return the step of a row, None where the line is damaged."""
    row = row_of(line)
    step = row.get("step") if row else None
    return step if type(step) is int and step >= 0 else None


def _end(log: BinaryIO, step: int) -> tuple[int, int]:
    """Return where the last sound row of at most `step` ends, and its step, looking from the end of the file."""
    for line, end in _backwards(log):
        found = _step(line)
        if found is not None and found <= step:
            return end, found
    return 0, 0


def _backwards(log: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield a file's lines from the last to the first, each with the place of its end."""
    place = log.seek(0, os.SEEK_END)
    held = b""
    while place:
        start = max(0, place - _BLOCK)
        log.seek(start)
        held, place = log.read(place - start) + held, start
        # What stands before the first line's end may be the rest of a line that begins in an earlier block.
        first, *lines = held.splitlines(keepends=True) if start else [b"", *held.splitlines(keepends=True)]
        end = place + len(held)
        for line in reversed(lines):
            yield line, end
            end -= len(line)
        held = first


def _forwards(log: BinaryIO, end: int) -> Iterator[bytes]:
    """Yield the lines of a file's first `end` bytes."""
    log.seek(0)
    place = 0
    while place < end and (line := log.readline(end - place)):
        place += len(line)
        yield line


def _sound(log: BinaryIO, end: int, step: int, repeats: bool) -> Iterator[tuple[bytes, int]]:
    """Yield the rows of a file's first `end` bytes that are sound and in order, with their steps.

    A row out of order is left out: a later one of a step that has been there, or one whose step is beyond that of the
    row after it, as a damaged number may be.
    """
    held, last = None, -1
    for line in _forwards(log, end):
        at = _step(line)
        if at is None or at > step or at < last or (at == last and not repeats):
            continue
        if held is not None and at < held[1]:
            held = line, at
        elif held is None or at > held[1] or repeats:
            if held is not None:
                yield held
                last = held[1]
            held = line, at
    if held is not None:
        yield held


def _count_lines(log: BinaryIO, end: int) -> int:
    return sum(1 for _ in _forwards(log, end))


def _is_plain(log: BinaryIO, end: int) -> bool:
    """Whether a file's first `end` bytes are ASCII without NUL, as all logs are that nothing has damaged."""
    log.seek(0)
    for start in range(0, end, _BLOCK):
        block = log.read(min(_BLOCK, end - start))
        if not block.isascii() or b"\0" in block:
            return False
    return True


def _truncate(log: BinaryIO, end: int, size: int) -> None:
    """Take the end off a file. A crash leaves the old length or the new one, and the next resume cuts again."""
    if end < size:
        log.truncate(end)
        os.fsync(log.fileno())
