"""Packing: any source of images becomes shards of even size, in a seeded shuffle, byte for byte.

Which image lies where is decided before anything is read: a permutation of all images by the seed, cut into runs of
equal length. Every shard depends on its own images alone, so several processes write them in any order, a shard is
complete or absent, and what was finished before a kill is not done again: the bytes are the same. An image that cannot
be decoded is left out of its shard and listed in `bad.jsonl`. `manifest.json` is written last.

    OUT/train-0000.tar ... val-0000.tar ... classes.txt  bad.jsonl  manifest.json
    OUT/.packing/  what is under way: the plan, a record for every finished shard, expanded archives
"""

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.data.decode import DecodeError, decode
from ijepa.data.order import sample_indices
from ijepa.data.sources import Source
from ijepa.errors import Failed, Refused
from ijepa.files import read_json
from ijepa.prepare.shards import FORMAT, Record, ShardPlan, complete_or_absent, write_shard

Tell = Callable[[str], None]
WORK = ".packing"
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
    sources: Mapping[str, Source], out: Path, settings: Settings, *, processes: int = 1, tell: Tell = lambda line: None
) -> dict[str, Any]:
    """Pack sources by split into `out`, going on where an earlier call was interrupted; return the manifest.

    Raises:
        Refused: a folder that holds something else, or other images or settings; no labels to hold out by.
        Failed: the disk refuses, or a process was killed; the same command goes on.
    """
    classes = _classes(sources)
    splits = _splits(sources, settings)
    if settings.max_side is not None and any(source.has_masks for source in sources.values()):
        raise Refused("--max-side", "would make images smaller than their masks", "pack them as they are")
    _open_folder(out, {"sources": {k: s.fingerprint for k, s in sources.items()}, **asdict(settings)})
    plans = [plan for split, (_, chosen) in splits.items() for plan in _cut(split, len(chosen), settings.shard_size)]
    left = [plan for plan in plans if not _record(out, plan).is_file()]
    jobs = [
        _Job(
            out, plan, sources[splits[plan.split][0]], splits[plan.split][1][plan.start : plan.stop], settings, classes
        )
        for plan in left
    ]
    total = sum(plan.stop - plan.start for plan in plans)
    done = total - sum(plan.stop - plan.start for plan in left)
    begun, before = time.monotonic(), done
    if before:
        tell(f"going on: {before} of {total} images are packed")
    for images in _each(jobs, processes):
        done += images
        rate = (done - before) / max(time.monotonic() - begun, 1e-9)
        tell(f"packed {done} of {total} images, {rate:.0f} a second, {(total - done) / rate / 60:.1f} minutes left")
    return _finish(out, plans, classes, settings, sources)


@dataclass(frozen=True)
class _Job:
    """One shard to be written."""

    out: Path
    plan: ShardPlan
    source: Source
    chosen: npt.NDArray[np.int64]
    settings: Settings
    classes: list[str]

    def run(self) -> int:
        """Write the shard and its record; return how many images it was to hold."""
        bad: list[dict[str, str]] = []
        entry = write_shard(self.out / self.plan.name, self._records(bad))
        with complete_or_absent(_record(self.out, self.plan)) as file:
            file.write(json.dumps({"entry": entry, "bad": bad}).encode())
        return len(self.chosen)

    def _records(self, bad: list[dict[str, str]]) -> Iterator[Record]:
        for index in self.chosen.tolist():
            sample = self.source[index]
            try:
                data, extension = _checked(sample.image, self.settings.max_side)
            except DecodeError as error:
                bad.append({"name": sample.name, "split": self.plan.split, "why": str(error)})
                continue
            stem = PurePosixPath(sample.name).name.rpartition(".")[0].replace(".", "_")
            stem = os.fsencode(stem)[:_STEM].decode(errors="ignore")  # a tar's names have a hundred bytes
            yield Record(
                f"{index:09d}-{stem}", data, _label(self.source, sample.label, self.classes), sample.mask, extension
            )


def _each(jobs: list[_Job], processes: int) -> Iterator[int]:
    """Run jobs, several at a time, and yield each one's images as it ends."""
    if processes <= 1 or len(jobs) <= 1:
        yield from (job.run() for job in jobs)
        return
    # spawn, not fork: a caller may hold threads, and a fork of those can hang.
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(job.run) for job in jobs]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise Failed("a packing process was killed; the same command goes on") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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


def _classes(sources: Mapping[str, Source]) -> list[str]:
    first = next(iter(sources.values()))
    return list(first.classes or [])


def _label(source: Source, label: int | None, classes: list[str]) -> int | None:
    """Return a sample's label by the packed set's numbers: splits may number their classes differently."""
    if label is None or source.classes is None or not classes:
        return label
    return classes.index(source.classes[label]) if list(source.classes) != classes else label


def _splits(sources: Mapping[str, Source], settings: Settings) -> dict[str, tuple[str, npt.NDArray[np.int64]]]:
    """Return, by split, the source and the order (m,) of its images' numbers."""
    names = set(next(iter(sources.values())).classes or ())
    for source in sources.values():
        strange = set(source.classes or ()) - names
        if strange:
            raise Refused(
                "classes", f"{sorted(strange)[0]} of a later split is not in the first", "give matching archives"
            )
    found = {}
    for split, source in sources.items():
        n = len(source)
        found[split] = split, sample_indices(settings.seed, np.arange(n), n)
    if settings.hold_out:
        if "val" in found:
            raise Refused("--hold-out", "there is a validation set already", "leave the validation archive out")
        source, order = sources["train"], found["train"][1]
        labels = source.require_labels("--hold-out")[order]
        by_class = np.argsort(labels, kind="stable")
        begins = np.searchsorted(labels[by_class], labels[by_class])
        held = np.zeros(len(order), dtype=np.bool_)
        held[by_class] = np.arange(len(order)) - begins < settings.hold_out
        if held.all():
            raise Refused(f"--hold-out {settings.hold_out}", "would leave nothing to train on", "give a smaller number")
        found = {"train": ("train", order[~held]), "val": ("train", order[held])}
    return found


def _cut(split: str, count: int, shard_size: int) -> list[ShardPlan]:
    """Cut `count` images into as few shards as hold them, of sizes that differ by one at most."""
    shards = -(-count // shard_size)
    ends = [count * number // shards for number in range(shards + 1)]
    return [ShardPlan(split, number, ends[number], ends[number + 1]) for number in range(shards)]


def check_folder(out: Path) -> None:
    """Refuse a folder that is packed already or holds anything but a packing under way."""
    if (out / "manifest.json").is_file():
        shutil.rmtree(out / WORK, ignore_errors=True)  # left by a kill at the very end
        raise Refused(out, "is packed already", "give another folder, or remove it first")
    under_way = (out / WORK).is_dir()
    if out.exists() and (not out.is_dir() or (not under_way and any(out.iterdir()))):
        raise Refused(out, "is not empty", "give a new folder, or remove it first")


def _open_folder(out: Path, plan: dict[str, Any]) -> None:
    check_folder(out)
    file = out / WORK / "plan.json"
    if file.is_file():
        before = read_json(file)
        for key, value in plan.items():
            if before.get(key) != value:
                shown = "other images" if key == "sources" else f"{key} = {before.get(key)}, not {value}"
                raise Refused(out, f"a packing with {shown} is under way there", "give another folder, or remove it")
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(out, f"cannot be created ({error.strerror})", "give a folder you may write to") from None
    with complete_or_absent(file) as stream:
        stream.write(json.dumps(plan).encode())


def _record(out: Path, plan: ShardPlan) -> Path:
    return out / WORK / f"{plan.name}.json"


def _finish(
    out: Path, plans: list[ShardPlan], classes: list[str], settings: Settings, sources: Mapping[str, Source]
) -> dict[str, Any]:
    records = {plan: read_json(_record(out, plan)) for plan in plans}
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
    with complete_or_absent(out / "bad.jsonl") as file:
        file.write("".join(json.dumps(each) + "\n" for each in bad).encode())
    if classes:
        with complete_or_absent(out / "classes.txt") as file:
            file.write("".join(f"{name}\n" for name in classes).encode())
    with complete_or_absent(out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    shutil.rmtree(out / WORK, ignore_errors=True)
    return manifest
