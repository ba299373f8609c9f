"""Packing: any source of images becomes shards of even size, in a seeded shuffle, byte for byte.

Which image lies where is decided before anything is read: a permutation of all images by the seed, cut into runs of
equal length. Every shard depends on its own images alone, so several processes write them in any order, a shard is
complete or absent, and what was finished before a kill is not done again: the bytes are the same. An image that cannot
be decoded is left out of its shard and listed in `bad.jsonl`. `manifest.json` is written last.

    OUT/train-0000.tar ... val-0000.tar ... classes.txt  bad.jsonl  manifest.json
    OUT/.packing/  what is under way, see `under_way`
"""

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.data.loading.decode import DecodeError, decode
from ijepa.data.loading.shuffle import sample_indices
from ijepa.data.sources.base import Source
from ijepa.prepare import pack_state
from ijepa.prepare.shard_writer import FORMAT, Record, ShardPlan, write_shard
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import atomic_file, read_json, write_errors
from ijepa.utils.progress import Progress, no_progress

Sources = Mapping[str, Source]
"""By split."""
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}
_QUALITY = 95
_STEM = 70
"""Bytes that a key keeps of an image's name; the number before it makes it the only one."""


@dataclass(frozen=True)
class Settings:
    """What decides the shards' bytes, beside the images.

    Attributes:
        seed: of the shuffle and of what is held out.
        shard_size: images of a shard, at most; shards of a split differ by one image.
        hold_out: images of each class that become the split `val`.
        max_side: longest side in pixels; larger images are made smaller and encoded anew. None keeps every byte.
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
    """Pack sources by split into `out`, going on where an earlier call was interrupted; return the manifest.

    `sources` may be a call that opens them, given a folder for the archives that have to be expanded.

    Raises:
        UserError: a folder that holds something else, or other images or settings; no labels to hold out by; labels or
            classes that `classes.txt` cannot name.
        RunError: the disk refuses, or a process was killed; the same command goes on.
    """
    with pack_state.claim(out) as work:
        whole = pack_state.already_whole(out, asdict(settings))
        if whole is not None:
            return whole
        opened = sources(work / pack_state.ARCHIVES) if callable(sources) else sources
        return _pack(opened, out, settings, processes, progress)


def _pack(sources: Sources, out: Path, settings: Settings, processes: int, progress: Progress) -> dict[str, Any]:
    classes = _classes(sources)
    splits = _splits(sources, settings, progress)
    if settings.max_side is not None and any(source.has_masks for source in sources.values()):
        raise UserError("--max-side", "would make images smaller than their masks", "pack them as they are")
    pack_state.go_on(out, {"sources": {k: s.stamp for k, s in sources.items()}, **asdict(settings)})
    plans = [plan for split, (_, chosen) in splits.items() for plan in _cut(split, len(chosen), settings.shard_size)]
    left = [plan for plan in plans if not pack_state.finished(out, plan)]
    numbers = {split: _numbers(source, classes) for split, source in sources.items()}
    jobs = []
    for plan in left:
        origin, chosen = splits[plan.split]
        jobs.append(_Job(out, plan, origin, chosen[plan.start : plan.stop], settings.max_side, numbers[origin]))
    total = sum(plan.stop - plan.start for plan in plans)
    done = total - sum(plan.stop - plan.start for plan in left)
    begun, before = time.monotonic(), done
    if before:
        progress(f"going on: {before} of {total} images are packed")
    for images in _each(jobs, sources, processes):
        done += images
        rate = (done - before) / max(time.monotonic() - begun, 1e-9)
        progress(f"packed {done} of {total} images, {rate:.0f} a second, {(total - done) / rate / 60:.1f} minutes left")
    return _finish(out, plans, classes, settings, sources)


@dataclass(frozen=True)
class _Job:
    """One shard to be written: images `chosen` of the source `origin`; `numbers` as `_numbers` returns them."""

    out: Path
    plan: ShardPlan
    origin: str
    chosen: npt.NDArray[np.int64]
    max_side: int | None
    numbers: list[int] | None

    def run(self, sources: Sources) -> int:
        """Write the shard and its record; return how many images it was to hold."""
        bad: list[dict[str, str]] = []
        entry = write_shard(self.out / self.plan.name, self._records(sources[self.origin], bad))
        with (
            write_errors(pack_state.record(self.out, self.plan)),
            atomic_file(pack_state.record(self.out, self.plan)) as file,
        ):
            file.write(json.dumps({"entry": entry, "bad": bad}).encode())
        return len(self.chosen)

    def _records(self, source: Source, bad: list[dict[str, str]]) -> Iterator[Record]:
        for index in self.chosen.tolist():
            sample = source[index]
            try:
                data, extension = _checked(sample.image, self.max_side)
            except DecodeError as error:
                bad.append({"name": sample.name, "split": self.plan.split, "why": str(error)})
                continue
            stem = PurePosixPath(sample.name).name.rpartition(".")[0].replace(".", "_")
            stem = os.fsencode(stem)[:_STEM].decode(errors="ignore")  # a tar's names have a hundred bytes
            label = sample.label if sample.label is None or self.numbers is None else self.numbers[sample.label]
            yield Record(f"{index:09d}-{stem}", data, label, sample.mask, extension)


def _each(jobs: list[_Job], sources: Sources, processes: int) -> Iterator[int]:
    """Run jobs, several at a time, and yield each one's images as it ends."""
    if processes <= 1 or len(jobs) <= 1:
        yield from (job.run(sources) for job in jobs)
        return
    # spawn, not fork: a caller may hold threads, and a fork of those can hang. Sources travel once a process.
    context, workers = get_context("spawn"), min(processes, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(sources,)) as pool:
        waiting = [pool.submit(_run, job) for job in jobs]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise RunError("a packing process was killed; the same command goes on") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_sources: Sources = {}
"""In a packing process: what it reads from."""


def _run(job: _Job) -> int:
    return job.run(_sources)


def _begin(sources: Sources) -> None:
    """Begin a packing process, which ends when the command is no more, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # when to stop is the command's decision
    global _sources
    _sources = sources
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _checked(data: bytes, max_side: int | None) -> tuple[bytes, str]:
    """Return an image's bytes and extension, if it decodes.

    Raises:
        DecodeError: it does not, or is of a kind that shards do not hold.
    """
    extension = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    pixels = decode(data)
    if max_side is not None and max(pixels.shape[:2]) > max_side:
        return _smaller(pixels, max_side), "jpg"
    if extension is None:
        raise DecodeError("is no JPEG, PNG or WebP; --max-side makes JPEGs of what is larger")
    return data, extension


def _smaller(pixels: npt.NDArray[np.uint8], max_side: int) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()


def _classes(sources: Sources) -> list[str]:
    """Return the names of the packed set's classes: those of the first split.

    Raises:
        UserError: a label without a name, a class of a later split that the first has not, or a name that is no line.
    """
    classes = list(next(iter(sources.values())).classes or ())
    for split, source in sources.items():
        strange = sorted(set(source.classes or ()) - set(classes))
        if strange:
            problem = f"{ascii(strange[0])[1:-1]} of {split} is not in the first split"
            raise UserError("classes", problem, "give matching archives")
        known = len(source.classes or classes)
        if known and source.labels is not None and int(source.labels.max()) >= known:
            problem = f"label {source.labels.max()} of {split} has no name: there are {known} classes"
            raise UserError("classes", problem, "name every class in the classes.txt beside the images")
    for name in classes:
        if name.splitlines() != [name] or not name.strip():
            raise UserError("classes", f"{name!r} is no name that fits a line of classes.txt", "rename that folder")
    return classes


def _numbers(source: Source, classes: list[str]) -> list[int] | None:
    """Return the packed set's number of each class of a source; None where they are the same."""
    if source.classes is None or list(source.classes) == classes:
        return None
    number = {name: place for place, name in enumerate(classes)}
    return [number[name] for name in source.classes]


def _splits(sources: Sources, settings: Settings, progress: Progress) -> dict[str, tuple[str, npt.NDArray[np.int64]]]:
    """Return, by split, the source and the order (m,) of its images' numbers."""
    found = {}
    for split, source in sources.items():
        n = len(source)
        found[split] = split, sample_indices(settings.seed, np.arange(n), n)
    if settings.hold_out:
        if list(sources) != ["train"]:
            raise UserError("--hold-out", f"takes from a training set alone, not from {', '.join(sources)}")
        order = found["train"][1]
        held = _held(sources["train"].require_labels("--hold-out")[order], settings.hold_out, progress)
        found = {"train": ("train", order[~held]), "val": ("train", order[held])}
    return found


def _held(labels: npt.NDArray[np.int32], count: int, progress: Progress) -> npt.NDArray[np.bool_]:
    """Return which images are held out: the first `count` of each label, but never its last one.

    Raises:
        UserError: no class has two images.
    """
    by_class = np.argsort(labels, kind="stable")
    ordered = labels[by_class]
    begins, ends = np.searchsorted(ordered, ordered), np.searchsorted(ordered, ordered, side="right")
    held = np.zeros(len(labels), dtype=np.bool_)
    held[by_class] = np.arange(len(labels)) - begins < np.minimum(count, ends - begins - 1)
    if not held.any():
        raise UserError(f"--hold-out {count}", "finds no class with two images", "leave it out")
    sizes = np.unique(labels, return_counts=True)[1]
    short = int((sizes <= count).sum())
    if short:
        progress(f"{short} of {len(sizes)} classes have {count} images or fewer: all but one of each are held out")
    return held


def _cut(split: str, count: int, shard_size: int) -> list[ShardPlan]:
    """Cut `count` images into as few shards as hold them, of sizes that differ by one at most."""
    shards = -(-count // shard_size)
    ends = [count * number // shards for number in range(shards + 1)]
    return [ShardPlan(split, number, ends[number], ends[number + 1]) for number in range(shards)]


def _finish(
    out: Path, plans: list[ShardPlan], classes: list[str], settings: Settings, sources: Sources
) -> dict[str, Any]:
    records = {plan: read_json(pack_state.record(out, plan)) for plan in plans}
    bad = [each for plan in plans for each in records[plan]["bad"]]
    splits: dict[str, Any] = {}
    for plan in plans:
        entry = records[plan]["entry"]
        part = splits.setdefault(plan.split, {"images": 0, "images_per_class": {}, "shards": []})
        part["images"] += entry["images"]
        for label, count in entry.pop("labels").items():
            name = classes[int(label)] if classes else label
            part["images_per_class"][name] = part["images_per_class"].get(name, 0) + count
        part["shards"].append(entry)
    for part in splits.values():
        part["images_per_class"] = dict(sorted(part["images_per_class"].items()))
    manifest = {
        "format": FORMAT,
        "packed": asdict(settings),
        "sources": {split: len(source) for split, source in sources.items()},
        "bad": len(bad),
        "classes": classes,
        "splits": splits,
    }
    with write_errors(out / "bad.jsonl"), atomic_file(out / "bad.jsonl") as file:
        file.write("".join(json.dumps(each) + "\n" for each in bad).encode())
    if classes:
        with write_errors(out / "classes.txt"), atomic_file(out / "classes.txt") as file:
            file.write(os.fsencode("".join(f"{name}\n" for name in classes)))
    with write_errors(out / "manifest.json"), atomic_file(out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    pack_state.clean(out)
    return manifest
