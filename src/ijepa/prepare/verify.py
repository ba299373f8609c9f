"""Checks of a data set: decoding every image, and comparing packed shards with the checksums in their manifest.

An image is bad if it cannot be read or decoded completely: evaluation would stop at it. Pretraining replaces only
images that it cannot decode as far as their crop, so it may use some of these. Masks are decoded too, and must have
the height and width of their image. Duplicates are images with equal file contents (SHA-256); the first of each group
is not counted.

Each process checks runs of neighboring samples, so that shards are read forward, and results are joined in the order of
the samples. So they do not depend on the number of processes.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ijepa.data.loading.decode import DecodeError, decode, decode_mask
from ijepa.data.sources.base import Source
from ijepa.prepare.processes import run_jobs
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import read_json, sha256_of
from ijepa.utils.progress import Progress, ProgressMeter, no_progress

SIDES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)
"""Lower ends of the histogram's bins: the shorter side in pixels."""

_RUN = 64


@dataclass
class CheckResult:
    """Totals, and `bad` as (name, why) and `duplicates` as (name, name of the first), in the order of the samples."""

    images: int = 0
    bytes: int = 0
    sides: list[int] = field(default_factory=lambda: [0] * len(SIDES))
    bad: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)


def check(
    source: Source, *, duplicates: bool = False, processes: int = 1, progress: Progress = no_progress
) -> CheckResult:
    """Read and decode every sample of `source`; the result does not depend on `processes`.

    Raises:
        UserError: `processes` is below 1.
    """
    if processes < 1:
        raise UserError("--processes", f"{processes} is out of range", "give at least 1")
    runs = [range(start, min(start + _RUN, len(source))) for start in range(0, len(source), _RUN)]
    result, first = CheckResult(), dict[bytes, str]()
    meter = ProgressMeter(progress, "checked", len(source))
    for run in run_jobs(partial(_check_run, source, duplicates), runs, processes):
        for sample in run:
            _count(result, sample, first)
        meter.update(result.images)
    return result


@dataclass(frozen=True)
class _Sample:
    """One sample: its shorter side or why it is bad, its size in bytes, and its hash if duplicates are wanted."""

    name: str
    side: int
    size: int
    why: str
    digest: bytes


def _check_run(source: Source, hashing: bool, run: range) -> list[_Sample]:
    return [_check_sample(source, hashing, index) for index in run]


def _check_sample(source: Source, hashing: bool, index: int) -> _Sample:
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
            shape = decode_mask(mask, "accept").shape  # the masks of some layouts are colors
            if shape[:2] != (height, width):
                why = f"its mask is {shape[1]} x {shape[0]}, but the image is {width} x {height}"
    except (DecodeError, RunError) as error:
        why = str(error)
    return _Sample(name, side, size, why, digest)


def _count(result: CheckResult, sample: _Sample, first: dict[bytes, str]) -> None:
    result.images += 1
    result.bytes += sample.size
    if sample.why:
        result.bad.append((sample.name, sample.why))
    else:
        result.sides[int(np.searchsorted(SIDES, sample.side, side="right")) - 1] += 1
    if sample.digest and (same := first.setdefault(sample.digest, sample.name)) is not sample.name:
        result.duplicates.append((sample.name, same))


def changed_shards(
    folder: Path, split: str | None = None, *, threads: int = 1, progress: Progress = no_progress
) -> tuple[int, list[str]]:
    """Compare shards with the SHA-256 checksums in their manifest.

    Returns:
        The number of shards in the manifest (of `split`, or of all splits), and a line for each that has changed.

    Raises:
        UserError: no manifest of `ijepa data pack` or `ijepa data scenes`, or no such split in it.
    """
    file, hint = folder / "manifest.json", "give a folder that `ijepa data pack` wrote"
    if not file.is_file():
        raise UserError("--checksums", f"{file} does not exist", hint)
    try:
        splits = {name: part["shards"] for name, part in read_json(file)["splits"].items()}
        listed = [shard for name, shards in splits.items() if split in (None, name) for shard in shards]
        expected = {str(shard["name"]): (int(shard["bytes"]), str(shard["sha256"])) for shard in listed}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(file, "not a manifest of shards", hint) from None
    if not expected:
        raise UserError(file, f"lists no shards of {split}", f"its splits are {', '.join(splits)}")
    meter, done = ProgressMeter(progress, "read", sum(size for size, _ in expected.values()), "GB", 1e9), 0
    lines = []
    with ThreadPoolExecutor(threads) as pool:  # hashing releases the interpreter lock
        digests = pool.map(lambda name: _digest(folder / name), expected)
        for (name, (size, digest)), found in zip(expected.items(), digests, strict=True):
            if found != digest:
                lines.append(f"{name}: {found}, but the manifest has {digest}")
            done += size
            meter.update(done)
    return len(expected), lines


def _digest(path: Path) -> str:
    """Return a file's SHA-256, or why it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        return str(error.strerror)
