"""Writes labeled images as WebDataset tar shards: KEY.jpg, KEY.cls, KEY.mask.png, one record after the other.

A folder of shards is `train-0000.tar ... val-0000.tar ... classes.txt manifest.json`. The manifest is written last, so
a folder with a manifest is complete. `classes.txt` has the name of one class per line, in the order of the labels. The
bytes of a shard depend on its records alone: members have no time, owner or machine, and the tar format is plain USTAR.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ijepa.prepare.processes import run_jobs
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import atomic_file, write_bytes, write_errors

FORMAT = 1
"""Version of the manifest's layout."""


@dataclass(frozen=True)
class Record:
    """One sample of a shard: `image` as encoded bytes with their `extension`, label and mask."""

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
    """A shard to be written: samples [start, stop) of a split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File name, in WebDataset's usual form."""
        return f"{self.split}-{self.number:04d}.tar"

    def __len__(self) -> int:
        return self.stop - self.start


def plan_shards(splits: Mapping[str, int], shard_size: int) -> list[ShardPlan]:
    """Cut each split of n samples into shards of `shard_size`, the last one shorter; empty splits have no shard."""
    return [
        ShardPlan(split, start // shard_size, start, min(start + shard_size, count))
        for split, count in splits.items()
        for start in range(0, count, shard_size)
    ]


def write_shard(path: Path, records: Iterable[Record]) -> dict[str, Any]:
    """Write one shard and return its manifest entry: name, images, bytes, sha256, count of each label.

    Raises:
        RunError: the shard cannot be written, or two records have the same key.
    """
    labels, keys = dict[int, int](), set[str]()
    digest = hashlib.sha256()
    with write_errors(path), atomic_file(path) as stream:

        def put(data: bytes) -> None:
            stream.write(data)
            digest.update(data)

        for record in records:
            if record.key in keys:
                raise RunError(f"{path}: two samples have the key {record.key}")
            keys.add(record.key)
            if record.label is not None:
                labels[record.label] = labels.get(record.label, 0) + 1
            for name, data in record.members():
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime = len(data), 0o644, 0
                put(member.tobuf(tarfile.USTAR_FORMAT))
                put(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        # Two empty blocks end a tar, and its size is a multiple of RECORDSIZE.
        end = stream.tell() + 2 * tarfile.BLOCKSIZE
        put(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        size = stream.tell()
    return {
        "name": path.name,
        "images": len(keys),
        "bytes": size,
        "sha256": digest.hexdigest(),
        "labels": {str(label): labels[label] for label in sorted(labels)},
    }


def write_file(path: Path, data: bytes) -> None:
    """Write a file next to the shards so that it is complete or absent.

    Raises:
        RunError: it cannot be written.
    """
    with write_errors(path):
        write_bytes(path, data)


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

    Args:
        out: a folder that does not exist or is empty.
        splits: number of samples by name of the split.
        records: makes the records of one shard; must be picklable if `processes` is above 1.
        classes: names of the labels.
        about: further entries of the manifest.
        shard_size: samples per shard.
        processes: shards that are written at the same time; the bytes do not depend on it.

    Raises:
        UserError: a folder that is not empty, or a number below 1.
        RunError: a shard cannot be written.
    """
    for flag, value in (("--shard-size", shard_size), ("--processes", processes)):
        if value < 1:
            raise UserError(flag, f"{value} is out of range", "give at least 1")
    folder = _empty_folder(Path(out))
    plans = plan_shards(splits, shard_size)
    entries = list(run_jobs(partial(_write_planned, folder, records), plans, processes))
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
        write_file(folder / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    write_file(folder / "manifest.json", json.dumps(manifest, indent=2).encode() + b"\n")
    return manifest


def _empty_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise UserError(folder, "is a file", "give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(folder, "is not empty", "give a new folder, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(folder, f"cannot be created ({error.strerror})", "give a folder you may write to") from error
    return folder


def _write_planned(folder: Path, records: Callable[[ShardPlan], Iterable[Record]], plan: ShardPlan) -> dict[str, Any]:
    return write_shard(folder / plan.name, records(plan))


def _summary(entries: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Return the manifest's part of one split: totals, and its shards without their label counts."""
    return {
        "images": sum(entry["images"] for entry in entries),
        "images_per_class": {
            name: sum(entry["labels"].get(str(label), 0) for entry in entries) for label, name in enumerate(classes)
        },
        "shards": [{key: value for key, value in entry.items() if key != "labels"} for entry in entries],
    }
