"""Writing labelled images as WebDataset tar shards: KEY.jpg, KEY.cls, KEY.mask.png, one record after another.

A folder of shards is `train-0000.tar ... val-0000.tar ... classes.txt manifest.json`. A shard is complete or absent:
it is written beside its name and renamed when it is on the disk; the manifest is written last, so a folder that
has one is whole. `classes.txt` has a class's name on each line, in the order of the labels. The bytes depend on the
records alone: members carry no time, owner or machine, and the tar layout is plain USTAR. Shards are independent,
so several processes may write them without changing a byte.
"""

import hashlib
import json
import multiprocessing
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import atomic_file, write_errors

FORMAT = 1
"""Version of the manifest's own layout."""


@dataclass(frozen=True)
class Record:
    """One sample on its way into a shard: `image` as encoded bytes with their `extension`, label and mask."""

    key: str
    image: bytes
    label: int | None = None
    mask: bytes | None = None
    extension: str = "jpg"

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Yield the tar members (name, bytes), the image first."""
        yield f"{self.key}.{self.extension}", self.image
        if self.label is not None:
            yield f"{self.key}.cls", b"%d" % self.label
        if self.mask is not None:
            yield f"{self.key}.mask.png", self.mask


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be: samples [start, stop) of a split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File name, in WebDataset's usual form."""
        return f"{self.split}-{self.number:04d}.tar"


def plan_shards(splits: Mapping[str, int], shard_size: int) -> list[ShardPlan]:
    """Cut each split of n samples into shards of `shard_size`, the last one shorter; empty splits have none."""
    return [
        ShardPlan(split, start // shard_size, start, min(start + shard_size, count))
        for split, count in splits.items()
        for start in range(0, count, shard_size)
    ]


def prepare_folder(out: str | Path) -> Path:
    """Create `out`, or take it as it is where it is empty; anything else is `UserError`."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(folder, "is a file", "give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(folder, "is not empty", "give a new folder, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(folder, f"cannot be created ({error.strerror})", "give a folder you may write to") from error
    return folder


def write_shard(path: Path, records: Iterable[Record]) -> dict[str, Any]:
    """Write one shard and return its manifest entry: name, images, bytes, sha256, count of each label."""
    images, labels, taken = 0, dict[int, int](), set[str]()
    digest = hashlib.sha256()
    with write_errors(path), atomic_file(path) as stream:

        def put(data: bytes) -> None:
            stream.write(data)
            digest.update(data)

        for record in records:
            if record.key in taken:
                raise RunError(f"{path}: two samples have the key {record.key}")
            taken.add(record.key)
            images += 1
            if record.label is not None:
                labels[record.label] = labels.get(record.label, 0) + 1
            for name, data in record.members():
                put(_header(name, len(data)))
                put(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        end = stream.tell() + 2 * tarfile.BLOCKSIZE
        put(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        size = stream.tell()
    return {
        "name": path.name,
        "images": images,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "labels": {str(label): labels[label] for label in sorted(labels)},
    }


def _header(name: str, size: int) -> bytes:
    """Return a tar header that says nothing but name and size."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o644, 0
    return member.tobuf(tarfile.USTAR_FORMAT)


def write_folder(
    out: str | Path,
    *,
    splits: Mapping[str, int],
    records: Callable[[ShardPlan], Iterable[Record]],
    classes: Sequence[str],
    about: Mapping[str, Any],
    shard_size: int = 2000,
    processes: int = 1,
) -> dict[str, Any]:
    """Write the shards of all splits, classes.txt and then manifest.json, and return the manifest.

    `splits` maps a split's name to its number of samples; `records(plan)` yields the records of one shard, and is
    picklable where `processes` is above 1; `about` goes into the manifest as it is. Raises `UserError` for a folder
    that is not empty, `RunError` where the disk fails.
    """
    if shard_size < 1:
        raise UserError("--shard-size", f"{shard_size} is no number of images", "give at least 1")
    if processes < 1:
        raise UserError("--processes", f"{processes} is no number of processes", "give at least 1")
    folder = prepare_folder(out)
    plans = plan_shards(splits, shard_size)
    write = partial(_write_planned, folder, records)
    if processes > 1 and len(plans) > 1:
        # spawn, not fork: a caller may hold threads (torch does), and a fork of those can hang.
        with multiprocessing.get_context("spawn").Pool(min(processes, len(plans))) as pool:
            entries = pool.map(write, plans, chunksize=1)
    else:
        entries = [write(plan) for plan in plans]
    manifest = {
        "format": FORMAT,
        **about,
        "classes": list(classes),
        "splits": {
            split: _summary([e for p, e in zip(plans, entries, strict=True) if p.split == split], classes)
            for split in splits
        },
    }
    if classes:
        with write_errors(folder / "classes.txt"), atomic_file(folder / "classes.txt") as stream:
            stream.write("".join(f"{name}\n" for name in classes).encode())
    with write_errors(folder / "manifest.json"), atomic_file(folder / "manifest.json") as stream:
        stream.write(json.dumps(manifest, indent=2).encode() + b"\n")
    return manifest


def _write_planned(folder: Path, records: Callable[[ShardPlan], Iterable[Record]], plan: ShardPlan) -> dict[str, Any]:
    return write_shard(folder / plan.name, records(plan))


def _summary(entries: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Return one split's part of the manifest: totals, and its shards without their label counts."""
    return {
        "images": sum(entry["images"] for entry in entries),
        "images_per_class": {
            name: sum(entry["labels"].get(str(label), 0) for entry in entries) for label, name in enumerate(classes)
        },
        "shards": [{key: value for key, value in e.items() if key != "labels"} for e in entries],
    }
