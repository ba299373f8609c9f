"""Packs any source of images into shards of even size, in a seeded shuffle, with unchanged image bytes.

The place of each image is decided before anything is read: all images are permuted by the seed, and the result is cut
into runs of equal length. A shard depends only on its own images. So several processes write shards in any order, and
after a kill the finished shards are kept: the bytes are the same. An image that cannot be decoded is left out of its
shard and listed in `bad.jsonl`. `manifest.json` is written last.

    OUT/train-0000.tar ... val-0000.tar ... classes.txt  bad.jsonl  manifest.json
    OUT/.packing/  state of an unfinished packing, see `pack_state`
"""

import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ijepa.data.loading.decode import DecodeError, decode
from ijepa.data.loading.shuffle import sample_indices
from ijepa.data.sources.base import Source
from ijepa.prepare import pack_state
from ijepa.prepare.processes import run_jobs
from ijepa.prepare.shard_writer import FORMAT, Record, ShardPlan, write_file, write_shard
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json
from ijepa.utils.progress import Progress, no_progress

Sources = Mapping[str, Source]
"""Sources by split."""
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}
_QUALITY = 95
_STEM = 70
"""Bytes of an image's name that a key keeps. The number before it makes the key unique."""


@dataclass(frozen=True)
class Settings:
    """Everything apart from the images that decides the bytes of the shards.

    Attributes:
        seed: seed of the shuffle, and so of the choice of images to hold out.
        shard_size: largest number of images in a shard; the shards of a split differ by at most one image.
        hold_out: images of each class that become the split `val`.
        max_side: longest side in pixels; larger images are resized and encoded again. None keeps all bytes.
    """

    seed: int = 0
    shard_size: int = 3000
    hold_out: int = 0
    max_side: int | None = None


def pack(
    sources: Sources | Callable[[Path], Sources],
    out: Path,
    settings: Settings,
    *,
    processes: int = 1,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Pack sources by split into `out`, resume an interrupted packing, and return the manifest.

    `sources` may be a function that opens them, given a folder for archives that have to be expanded.

    Raises:
        UserError: `out` holds something else, or an unfinished packing of other images or settings; no labels to hold
            out by; labels or classes that `classes.txt` cannot name.
        RunError: a file cannot be written, or a process was killed; the same command resumes.
    """
    with pack_state.lock(out) as work:
        finished = pack_state.finished_manifest(out, asdict(settings))
        if finished is not None:
            return finished
        opened = sources(work / pack_state.ARCHIVES) if callable(sources) else sources
        return _pack(opened, out, settings, processes, progress)


def _pack(sources: Sources, out: Path, settings: Settings, processes: int, progress: Progress) -> dict[str, Any]:
    classes = _classes(sources)
    splits = _splits(sources, settings, progress)
    if settings.max_side is not None and any(source.has_masks for source in sources.values()):
        raise UserError("--max-side", "would make images smaller than their masks", "remove it")
    pack_state.resume(out, {"sources": {k: s.stamp for k, s in sources.items()}, **asdict(settings)})
    numbers = {split: _numbers(source, classes) for split, source in sources.items()}
    jobs = [
        _Job(out, plan, origin, chosen[plan.start : plan.stop], settings.max_side, numbers[origin])
        for split, (origin, chosen) in splits.items()
        for plan in _cut(split, len(chosen), settings.shard_size)
    ]
    left = [job for job in jobs if not pack_state.is_finished(out, job.plan)]
    total = sum(len(job.plan) for job in jobs)
    done = before = total - sum(len(job.plan) for job in left)
    start = time.monotonic()
    if before:
        progress(f"resuming: {before} of {total} images are packed")
    for images in run_jobs(partial(_pack_shard, sources), left, processes):
        done += images
        rate = (done - before) / max(time.monotonic() - start, 1e-9)
        minutes = (total - done) / rate / 60
        progress(f"packed {done} of {total} images, {rate:.0f} per second, {minutes:.1f} minutes left")
    return _finish(out, [job.plan for job in jobs], classes, settings, sources)


@dataclass(frozen=True)
class _Job:
    """One shard to write: images `chosen` of the source `origin`; `numbers` as `_numbers` returns them."""

    out: Path
    plan: ShardPlan
    origin: str
    chosen: npt.NDArray[np.int64]
    max_side: int | None
    numbers: list[int] | None


def _pack_shard(sources: Sources, job: _Job) -> int:
    """Write a shard and its record; return the number of images that were read for it."""
    bad: list[dict[str, str]] = []
    entry = write_shard(job.out / job.plan.name, _records(sources[job.origin], job, bad))
    write_file(pack_state.record(job.out, job.plan), json.dumps({"entry": entry, "bad": bad}).encode())
    return len(job.plan)


def _records(source: Source, job: _Job, bad: list[dict[str, str]]) -> Iterator[Record]:
    for index in job.chosen.tolist():
        sample = source[index]
        try:
            data, extension = _checked(sample.image, job.max_side)
        except DecodeError as error:
            bad.append({"name": sample.name, "split": job.plan.split, "why": str(error)})
            continue
        stem = PurePosixPath(sample.name).name.rpartition(".")[0].replace(".", "_")
        stem = os.fsencode(stem)[:_STEM].decode(errors="ignore")  # names in a tar have at most 100 bytes
        label = sample.label if sample.label is None or job.numbers is None else job.numbers[sample.label]
        yield Record(f"{index:09d}-{stem}", data, label, sample.mask, extension)


def _checked(data: bytes, max_side: int | None) -> tuple[bytes, str]:
    """Return an image's bytes, resized if it is larger than `max_side`, and their extension.

    Raises:
        DecodeError: it cannot be decoded, or shards do not hold images of its format.
    """
    extension = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    pixels = decode(data)
    if max_side is not None and max(pixels.shape[:2]) > max_side:
        image, stream = Image.fromarray(pixels), io.BytesIO()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        image.save(stream, "JPEG", quality=_QUALITY)
        return stream.getvalue(), "jpg"
    if extension is None:
        raise DecodeError("not a JPEG, PNG or WebP; --max-side converts larger images to JPEG")
    return data, extension


def _classes(sources: Sources) -> list[str]:
    """Return the names of the packed set's classes: those of the first split.

    Raises:
        UserError: a label without a name, a class of a later split that the first does not have, or a name that does
            not fit into a line.
    """
    classes = list(next(iter(sources.values())).classes or ())
    for split, source in sources.items():
        unknown = sorted(set(source.classes or ()) - set(classes))
        if unknown:
            problem = f"{ascii(unknown[0])[1:-1]} of {split} is not in the first split"
            raise UserError("classes", problem, "give archives with the same classes")
        known = len(source.classes or classes)
        if known and source.labels is not None and int(source.labels.max()) >= known:
            problem = f"label {source.labels.max()} of {split} has no name: there are {known} classes"
            raise UserError("classes", problem, "name every class in the classes.txt next to the images")
    for name in classes:
        if name.splitlines() != [name] or not name.strip():
            raise UserError("classes", f"{name!r} cannot be written as one line of classes.txt", "rename that folder")
    return classes


def _numbers(source: Source, classes: list[str]) -> list[int] | None:
    """Return the packed set's label of each class of a source; None if they are the same."""
    if source.classes is None or list(source.classes) == classes:
        return None
    number = {name: place for place, name in enumerate(classes)}
    return [number[name] for name in source.classes]


def _splits(sources: Sources, settings: Settings, progress: Progress) -> dict[str, tuple[str, npt.NDArray[np.int64]]]:
    """Return by split: the name of its source, and the shuffled numbers (m,) of its images."""
    splits = {
        split: (split, sample_indices(settings.seed, np.arange(len(source)), len(source)))
        for split, source in sources.items()
    }
    if settings.hold_out:
        if list(sources) != ["train"]:
            raise UserError("--hold-out", f"needs a training set only, not {', '.join(sources)}")
        order = splits["train"][1]
        held = _held_out(sources["train"].require_labels("--hold-out")[order], settings.hold_out, progress)
        splits = {"train": ("train", order[~held]), "val": ("train", order[held])}
    return splits


def _held_out(labels: npt.NDArray[np.int32], count: int, progress: Progress) -> npt.NDArray[np.bool_]:
    """Return a mask of the held-out images: the first `count` of each label, but never all of them.

    Raises:
        UserError: no class has two images.
    """
    by_class = np.argsort(labels, kind="stable")
    ordered = labels[by_class]
    starts, ends = np.searchsorted(ordered, ordered), np.searchsorted(ordered, ordered, side="right")
    held = np.zeros(len(labels), dtype=np.bool_)
    held[by_class] = np.arange(len(labels)) - starts < np.minimum(count, ends - starts - 1)
    if not held.any():
        raise UserError(f"--hold-out {count}", "no class has two images", "remove it")
    sizes = np.unique(labels, return_counts=True)[1]
    short = int((sizes <= count).sum())
    if short:
        progress(f"{short} of {len(sizes)} classes have {count} images or fewer: all but one of each are held out")
    return held


def _cut(split: str, count: int, shard_size: int) -> list[ShardPlan]:
    """Cut `count` images into the smallest number of shards, whose sizes differ by at most one."""
    shards = -(-count // shard_size)
    ends = [count * number // shards for number in range(shards + 1)]
    return [ShardPlan(split, number, ends[number], ends[number + 1]) for number in range(shards)]


def _finish(
    out: Path, plans: list[ShardPlan], classes: list[str], settings: Settings, sources: Sources
) -> dict[str, Any]:
    """Write bad.jsonl, classes.txt and the manifest, and remove the state."""
    bad: list[dict[str, str]] = []
    splits: dict[str, Any] = {}
    for plan in plans:
        record = read_json(pack_state.record(out, plan))
        bad += record["bad"]
        entry = record["entry"]
        split = splits.setdefault(plan.split, {"images": 0, "images_per_class": {}, "shards": []})
        split["images"] += entry["images"]
        per_class = split["images_per_class"]
        for label, count in entry.pop("labels").items():
            name = classes[int(label)] if classes else label
            per_class[name] = per_class.get(name, 0) + count
        split["shards"].append(entry)
    for split in splits.values():
        split["images_per_class"] = dict(sorted(split["images_per_class"].items()))
    manifest = {
        "format": FORMAT,
        "packed": asdict(settings),
        "sources": {split: len(source) for split, source in sources.items()},
        "bad": len(bad),
        "classes": classes,
        "splits": splits,
    }
    write_file(out / "bad.jsonl", "".join(json.dumps(each) + "\n" for each in bad).encode())
    if classes:
        write_file(out / "classes.txt", os.fsencode("".join(f"{name}\n" for name in classes)))
    write_file(out / "manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
    pack_state.remove_state(out)
    return manifest
