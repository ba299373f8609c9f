"""Where the samples of a tar shard lie: a walk over its headers, no data read but labels.

A shard follows WebDataset's naming: the part of a member's name before the first dot of its last component is the
sample's key, the rest is the field: `KEY.jpg` (jpeg, png, webp), `KEY.cls` or `KEY.json`, `KEY.mask.png`. Other fields
are not read.

As in WebDataset, a sample is a run of consecutive members with one key, in any order, and a field that occurs again
starts a new sample. So a key may name several samples, as it does after shards were concatenated. A field that stands
apart from its image (all images first, then all labels) belongs to the image of its key if the key has only one.

The standard library's tarfile builds an object a member and takes six times as long. This walk understands what
writers of shards produce: ustar with its prefix field, GNU long names and binary sizes, pax headers. An archive that
does not end in its end mark was cut: it is an error with the byte's offset, since a walk that just stopped would
lose samples without a word.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 512
IMAGE_FIELDS = frozenset({b"jpg", b"jpeg", b"png", b"webp"})

_IMAGE = b"jpg"
"""Stands for all of IMAGE_FIELDS: two images of one key are two samples."""
_WINDOW = 8 * BLOCK  # one read covers the small members (pax header, label) between two images
_ZEROS = bytes(BLOCK)
_DIGITS = 20
"""Longer is no file's size, and what is much longer Python would not take for a number."""
_FILE = ord("0")
_new = tuple.__new__  # a third of what a NamedTuple's own call costs
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class TarError(ValueError):
    """This file is no tar archive that can be read whole; `hint` says what may help."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.hint = hint


class Member(NamedTuple):
    """A regular file in a tar. `renamed`: its name comes from a header before its own."""

    name: bytes
    offset: int
    size: int
    renamed: bool


@dataclass(frozen=True)
class Shard:
    """The samples of one shard, in the order of their images.

    `block` and `size` (n,) uint32 place each image: it starts at byte 512 * block, and its own header stands in
    the block before. `label` (n,) int32 is -1 where there is none; `mask_block` and `mask_size` are 0 where there
    is no mask. `renamed` holds the names that the samples' own headers do not.
    """

    block: npt.NDArray[np.uint32]
    size: npt.NDArray[np.uint32]
    label: npt.NDArray[np.int32]
    mask_block: npt.NDArray[np.uint32]
    mask_size: npt.NDArray[np.uint32]
    renamed: dict[int, bytes]
    other_fields: tuple[str, ...]


@dataclass(slots=True)
class _Run:
    """Consecutive members of one key, each field at most once. `block` is 0 without an image.

    `label` and `described` are what .cls and .json say, -1 where that is no label; `name` is set where the image's own
    header does not hold it.
    """

    key: bytes
    block: int = 0
    size: int = 0
    label: int | None = None
    described: int | None = None
    mask: tuple[int, int] | None = None
    name: bytes | None = None


class _Window:
    """Reads from a file with one system call for neighbours. What is held begins at byte `start` of the file."""

    begin = 0
    """Where in the file the archive begins."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.start, self.held = descriptor, 0, b""

    def read(self, offset: int, length: int) -> bytes:
        start = offset - self.start
        if start < 0 or start + length > len(self.held):
            self.held, self.start, start = os.pread(self.descriptor, max(length, _WINDOW), offset), offset, 0
        return self.held[start : start + length]


def header_name(header: bytes) -> bytes:
    """Return the name that a member's own header holds, the ustar prefix joined."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def scan_tar(path: Path) -> Shard:
    """Return where the samples of a shard lie.

    Raises:
        TarError: not a tar, or cut short.
        OSError: unreadable.
    """
    runs: list[_Run] = []
    key, fields, others = None, set[bytes](), set[bytes]()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        window = _Window(descriptor)
        for name, offset, size, named_before in walk(window, os.fstat(descriptor).st_size):
            base = name.rfind(b"/") + 1
            dot = name.find(b".", base)
            if dot == base or base == len(name):
                continue  # a hidden file
            before, (key, field) = key, (name[:dot], name[dot + 1 :].lower()) if dot > 0 else (name, b"")
            if field in IMAGE_FIELDS:
                field = _IMAGE
            if key != before or field in fields:
                run = _Run(key)
                runs.append(run)
                fields.clear()
            fields.add(field)
            if field == _IMAGE:
                run.block, run.size = offset // BLOCK, size
                if named_before:
                    run.name = name
            elif field == b"cls":
                run.label = _label(window.read(offset, size))
            elif field == b"json":
                run.described = _described_label(window.read(offset, size))
            elif field == b"mask.png":
                run.mask = offset // BLOCK, size
            else:
                others.add(field)
    finally:
        os.close(descriptor)
    samples = [run for run in runs if run.block]
    if len(samples) < len(runs):
        _attach([run for run in runs if not run.block], samples)
    rows = [(run.block, run.size, _first_label(run.label, run.described), *(run.mask or (0, 0))) for run in samples]
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    return Shard(
        block=table[:, 0].astype(np.uint32),
        size=table[:, 1].astype(np.uint32),
        label=table[:, 2].astype(np.int32),
        mask_block=table[:, 3].astype(np.uint32),
        mask_size=table[:, 4].astype(np.uint32),
        renamed={i: run.name for i, run in enumerate(samples) if run.name is not None},
        other_fields=tuple(sorted(field.decode(errors="replace") for field in others)),
    )


def _attach(apart: list[_Run], samples: list[_Run]) -> None:
    """Give the samples the fields that stand apart from their images, where a key has one image only."""
    by_key: dict[bytes, _Run | None] = {}
    for sample in samples:
        by_key[sample.key] = None if sample.key in by_key else sample
    for run in apart:
        only = by_key.get(run.key)
        if only is not None:
            only.label = run.label if only.label is None else only.label
            only.described = run.described if only.described is None else only.described
            only.mask = run.mask if only.mask is None else only.mask


def _first_label(*labels: int | None) -> int:
    """Return the first label that is one, -1 where none is."""
    return next((label for label in labels if label is not None and label >= 0), -1)


def walk(window: _Window, length: int) -> Iterator[Member]:
    """Yield the regular files of a tar of `length` bytes, in their order."""
    offset, name, size = 0, None, None
    while True:
        if offset + BLOCK > length:
            raise _cut(offset, length)
        place, held = window.begin + offset - window.start, window.held
        if place < 0 or place + BLOCK > len(held):
            if len(window.read(offset, BLOCK)) < BLOCK:
                raise _cut(offset, length)
            place, held = 0, window.held
        # Nearly every header is a file's, in the form that all writers share. What follows would find the same, slower.
        stop, digits = held.find(0, place, place + 100), held[place + 124 : place + 135]
        if (
            name is None is size
            and stop > place
            and not digits.strip(b"01234567")
            and held[place + 135] in b"\0 "
            and held[place + 156] == _FILE
            and held[place + 257 : place + 262] == b"ustar"
            and not held[place + 345]
        ):
            start = offset + BLOCK
            end = start + int(digits, 8)
            if end > length:
                raise _cut(offset, length)
            yield _new(Member, (held[place:stop], start, end - start, False))
            offset = (end + BLOCK - 1) // BLOCK * BLOCK
            continue
        header = held[place : place + BLOCK]
        if header == _ZEROS:
            return
        own_size, kind = _check(header, offset), header[156]
        if kind in _WITHOUT_DATA:
            offset, name, size = offset + BLOCK, None, None
            continue
        end = offset + BLOCK + (own_size if size is None or kind in b"LKxg" else size)
        if end > length:
            raise _cut(offset, length)
        if kind == ord("L"):
            name = window.read(offset + BLOCK, own_size).split(b"\0", 1)[0]
        elif kind == ord("x"):
            records = _pax(window.read(offset + BLOCK, own_size))
            name = records.get(b"path", name)
            if b"size" in records:
                digits = records[b"size"]
                if not digits.isdigit() or len(digits) > _DIGITS:
                    raise TarError(
                        f"is damaged: a size that is no number in the header at byte {offset}", "copy or pack it again"
                    )
                size = int(digits)
        elif kind not in b"Kg":
            if kind == ord("S"):
                raise TarError(f"has a sparse member at byte {offset}", "write it without --sparse")
            start = offset + BLOCK
            yield Member(name or header_name(header), start, end - start, name is not None)
            name, size = None, None
        offset = -(-end // BLOCK) * BLOCK


def _check(header: bytes, offset: int) -> int:
    """Return the size a header states, or raise where it is no header."""
    field = header[124:136]
    try:
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.rstrip(b" \0") or b"0", 8)
        # Magic is quick to see and on all archives of this century; the sum settles it for the older ones.
        known = header[257:262] == b"ustar" or (
            int(header[148:156].strip(b" \0") or b"0", 8) == sum(header) - sum(header[148:156]) + 256
        )
    except ValueError:
        known = False
    if known and size >= 0:
        return size
    if offset:
        raise TarError(f"is damaged: no member header at byte {offset}", "copy or pack it again")
    for magic, program in _COMPRESSED.items():
        if header.startswith(magic):
            raise TarError(
                f"is compressed ({program}): samples in it cannot be reached one by one", "unpack it to .tar"
            )
    raise TarError("is not a tar archive", "give tar shards or a folder of images")


def _cut(offset: int, length: int) -> TarError:
    return TarError(
        f"is cut short: it ends at byte {length}, within what starts at byte {offset}",
        "copy it again, or pack it again; if it is known to be whole, `truncate -s +1024` adds the missing end mark",
    )


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Return the records of a pax header: `length key=value newline`, the length counting itself."""
    records: dict[bytes, bytes] = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or len(digits) > _DIGITS or int(digits) <= len(digits):
            break
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key], data = value, data[int(digits) :]
    return records


def _label(text: bytes) -> int:
    """Return the integer a .cls member holds, or -1: whoever needs labels is told which are missing."""
    text = text.strip()
    return int(text) if text.isdigit() and len(text) < 10 else -1


def _described_label(text: bytes) -> int:
    try:
        values = json.loads(text)
    except ValueError:
        return -1
    if not isinstance(values, dict):
        return -1
    label = values.get("label", values.get("cls"))
    return label if type(label) is int and 0 <= label < 2**31 else -1
