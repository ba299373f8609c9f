"""Verifying a data set: every image is read and decoded whole, and what is found is counted.

An image is bad where `decode` refuses it or its bytes cannot be read: evaluation would stop at it. Pretraining replaces
no other image, and may keep some of these: it decodes no further than its crop, so that damage below goes unseen. Masks
are decoded too, and must have their image's height and width. Duplicates are images whose file contents are equal
(SHA-256); the first of each group is not counted.

Samples are handed to processes in runs of neighbours, so that shards are read forward, and results are joined in the
samples' order: the outcome does not depend on the number of processes. Memory is a few numbers a sample, and 32 bytes
more where duplicates are asked for.
"""

import hashlib
import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ijepa.data.loading.decode import DecodeError, decode, decode_mask
from ijepa.data.sources.base import Source
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.progress import Progress, ProgressMeter, no_progress

SIDES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)
"""Lower ends of the histogram's bins: the shorter side in pixels."""

_RUN = 64


@dataclass
class Found:
    """What a check found: `bad` and `duplicates` as (name, why) and (name, name of the first), in order."""

    images: int = 0
    bytes: int = 0
    sides: list[int] = field(default_factory=lambda: [0] * len(SIDES))
    bad: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)

    def lines(self, width: int = 40) -> list[str]:
        """Return the summary, with a histogram of the shorter side, and every bad image and duplicate."""
        good = self.images - len(self.bad)
        out = [f"{self.images} images, {self.bytes / 1e9:.3f} GB: {good} good, {len(self.bad)} bad"]
        out.append("shorter side in pixels")
        tallest = max(self.sides) or 1
        for i, (low, count) in enumerate(zip(SIDES, self.sides, strict=True)):
            if count:
                span = f"{low}-{SIDES[i + 1] - 1}" if i + 1 < len(SIDES) else f"{low} and more"
                out.append(f"{span:>13} {count:>9} {'#' * max(1, round(width * count / tallest))}")
        out += [f"bad: {name}: {why}" for name, why in self.bad]
        out += [f"duplicate: {name} is {first}" for name, first in self.duplicates]
        return out


def check(
    source: Source,
    *,
    duplicates: bool = False,
    processes: int = 1,
    progress: Progress = no_progress,
) -> Found:
    """Read and decode every sample of `source`; `processes` changes the time and nothing else.

    Raises:
        UserError: `processes` below 1.
    """
    if processes < 1:
        raise UserError("--processes", f"{processes} is no number of processes", "give at least 1")
    runs = [range(start, min(start + _RUN, len(source))) for start in range(0, len(source), _RUN)]
    look = partial(_look, source, duplicates)
    if processes == 1 or len(runs) == 1:
        return _join(map(look, runs), len(source), progress)
    # spawn, not fork: a caller may hold threads (torch does), and a fork of those can hang.
    with multiprocessing.get_context("spawn").Pool(min(processes, len(runs))) as pool:
        return _join(pool.imap(look, runs), len(source), progress)


@dataclass(frozen=True)
class _Seen:
    """One sample: its shorter side or why it is bad, its size, and its hash where asked for."""

    name: str
    side: int
    size: int
    why: str
    digest: bytes


def _look(source: Source, hashing: bool, samples: Iterable[int]) -> list[_Seen]:
    return [_look_at(source, hashing, index) for index in samples]


def _look_at(source: Source, hashing: bool, index: int) -> _Seen:
    name, side, size, why, digest = f"sample {index}", 0, 0, "", b""
    try:
        name = source.name(index)
        data = source.image(index)
        size = len(data)
        digest = hashlib.sha256(data).digest() if hashing else b""
        height, width, _ = decode(data).shape
        side = min(height, width)
        mask = source.mask(index)
        if mask is not None:
            shape = decode_mask(mask, "accept").shape  # some layouts' masks are colours
            if shape[:2] != (height, width):
                why = f"its mask is {shape[1]} x {shape[0]}, the image {width} x {height}"
    except (DecodeError, RunError) as error:
        why = str(error)
    return _Seen(name, side, size, why, digest)


def _join(results: Iterable[list[_Seen]], total: int, progress: Progress) -> Found:
    found, first = Found(), dict[bytes, str]()
    meter = ProgressMeter(progress, "checked", total)
    for run in results:
        for seen in run:
            _count(found, seen, first)
        meter.update(found.images)
    return found


def _count(found: Found, seen: _Seen, first: dict[bytes, str]) -> None:
    found.images += 1
    found.bytes += seen.size
    if seen.why:
        found.bad.append((seen.name, seen.why))
    else:
        found.sides[int(np.searchsorted(SIDES, seen.side, side="right")) - 1] += 1
    if seen.digest:
        same = first.setdefault(seen.digest, seen.name)
        if same is not seen.name:
            found.duplicates.append((seen.name, same))
