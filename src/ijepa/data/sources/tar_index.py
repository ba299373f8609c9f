"""Find the samples of a tar shard by reading its headers; of the data, only labels are read.

A shard follows WebDataset's naming: in the last component of a member's name, the part before the first dot is the key
of the sample and the rest is the field: `KEY.jpg` (jpeg, png, webp), `KEY.cls` or `KEY.json`, `KEY.mask.png`. Other
fields are ignored.

As in WebDataset, a sample is a sequence of consecutive members with one key, in any order, and a field that occurs
again starts a new sample. So a key may name several samples, as in concatenated shards. A field that is not next to its
image (all images first, then all labels) belongs to the image of its key if the key has only one image.

Python's tarfile creates an object per member and takes six times as long. This walk understands what writers of shards
produce: ustar with its prefix field, GNU long names and binary sizes, pax headers. An archive without its end mark was
truncated. It is an error with the byte offset, because a walk that just stops would silently lose samples.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 512
IMAGE_FIELDS = frozenset({b"jpg", b"jpeg", b"png", b"webp"})

_IMAGE = b"jpg"
"""Stands for all of IMAGE_FIELDS, because two images with one key are two samples."""
_BUFFER = 8 * BLOCK  # one read covers the small members (pax header, label) between two images
_ZEROS = bytes(BLOCK)
_MAX_DIGITS = 20
"""No file size has more digits, and Python refuses to parse very long numbers."""
_FILE = ord("0")
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_new_tuple = tuple.__new__  # takes a third of the time of Member(...)


class TarError(ValueError):
    """This file is not a complete tar archive; `hint` says what may help."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.hint = hint


class Member(NamedTuple):
    """A regular file in a tar. `renamed`: its name is in an extra header before its own."""

    name: bytes
    offset: int
    size: int
    renamed: bool


@dataclass(frozen=True)
class Shard:
    """The samples of one shard, in the order of their images.

    `block` and `size` (n,) uint32 locate each image: it starts at byte 512 * block, and its header is the block before.
    `label` (n,) int32 is -1 if there is none; `mask_block` and `mask_size` are 0 if there is no mask. `renamed` maps
    samples to their names if these are not in the image's own header.
    """

    block: npt.NDArray[np.uint32]
    size: npt.NDArray[np.uint32]
    label: npt.NDArray[np.int32]
    mask_block: npt.NDArray[np.uint32]
    mask_size: npt.NDArray[np.uint32]
    renamed: dict[int, bytes]
    other_fields: tuple[str, ...]


class TarReader:
    """Reads a tar, or a tar inside a tar, with one system call for neighboring parts. Offsets count from its begin."""

    def __init__(self, descriptor: int, begin: int, length: int) -> None:
        self.descriptor, self.begin, self.length = descriptor, begin, length
        self.buffer, self.start = b"", 0  # the buffer's first byte is at offset `start`

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer at the end of the file."""
        start = offset - self.start
        if start < 0 or start + length > len(self.buffer):
            self.buffer = os.pread(self.descriptor, max(length, _BUFFER), self.begin + offset)
            self.start, start = offset, 0
        return self.buffer[start : start + length]

    def inner(self, member: Member) -> "TarReader":
        """Return a reader of a member that is a tar itself."""
        return TarReader(self.descriptor, self.begin + member.offset, member.size)


@contextmanager
def open_tar(path: Path) -> Iterator[TarReader]:
    """Open a tar for `walk`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield TarReader(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class _Sample:
    """Consecutive members with one key. `block` is 0 without an image.

    `cls` and `described` are the labels in .cls and .json, -1 if that is not a label; `name` is None if the image's own
    header contains it.
    """

    key: bytes
    block: int = 0
    size: int = 0
    cls: int | None = None
    described: int | None = None
    mask: tuple[int, int] | None = None
    name: bytes | None = None

    def set_field(self, field: bytes, member: Member, reader: TarReader) -> bool:
        """Store a member's content or place; return False if its field is not used."""
        if field == _IMAGE:
            self.block, self.size = member.offset // BLOCK, member.size
            self.name = member.name if member.renamed else None
        elif field == b"cls":
            self.cls = _parse_cls(reader.read(member.offset, member.size))
        elif field == b"json":
            self.described = _parse_json_label(reader.read(member.offset, member.size))
        elif field == b"mask.png":
            self.mask = member.offset // BLOCK, member.size
        else:
            return False
        return True

    def row(self) -> tuple[int, int, int, int, int]:
        """Return block, size, label, mask block and mask size."""
        labels = (label for label in (self.cls, self.described) if label is not None and label >= 0)
        return self.block, self.size, next(labels, -1), *(self.mask or (0, 0))


def header_name(header: bytes) -> bytes:
    """Return the name in a member's own header, with the ustar prefix."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def scan_tar(path: Path) -> Shard:
    """Return where the samples of a shard are.

    Raises:
        TarError: not a tar, or truncated.
        OSError: the file cannot be read.
    """
    found: list[_Sample] = []
    key, fields, others = None, set[bytes](), set[bytes]()
    with open_tar(path) as reader:
        for member in walk(reader):
            name = member.name
            base = name.rfind(b"/") + 1
            dot = name.find(b".", base)
            if dot == base or base == len(name):
                continue  # a hidden file, or no file name
            previous, (key, field) = key, (name[:dot], name[dot + 1 :].lower()) if dot > 0 else (name, b"")
            if field in IMAGE_FIELDS:
                field = _IMAGE
            if key != previous or field in fields:
                found.append(_Sample(key))
                fields.clear()
            fields.add(field)
            if not found[-1].set_field(field, member, reader):
                others.add(field)
    samples = [sample for sample in found if sample.block]
    if len(samples) < len(found):
        _merge_separate_fields([sample for sample in found if not sample.block], samples)
    table = np.array([sample.row() for sample in samples], dtype=np.int64).reshape(-1, 5)
    return Shard(
        block=table[:, 0].astype(np.uint32),
        size=table[:, 1].astype(np.uint32),
        label=table[:, 2].astype(np.int32),
        mask_block=table[:, 3].astype(np.uint32),
        mask_size=table[:, 4].astype(np.uint32),
        renamed={i: sample.name for i, sample in enumerate(samples) if sample.name is not None},
        other_fields=tuple(sorted(field.decode(errors="replace") for field in others)),
    )


def _merge_separate_fields(separate: list[_Sample], samples: list[_Sample]) -> None:
    """Give samples the fields that are not next to their images, if the key has only one image."""
    by_key: dict[bytes, _Sample | None] = {}
    for sample in samples:
        by_key[sample.key] = None if sample.key in by_key else sample
    for other in separate:
        only = by_key.get(other.key)
        if only is not None:
            only.cls = other.cls if only.cls is None else only.cls
            only.described = other.described if only.described is None else only.described
            only.mask = other.mask if only.mask is None else only.mask


def walk(reader: TarReader) -> Iterator[Member]:
    """Yield the regular files of a tar, in order.

    Raises:
        TarError: not a tar, damaged, or truncated.
    """
    length, offset, name, size = reader.length, 0, None, None
    while True:
        if offset + BLOCK > length:
            raise _truncated(offset, length)
        at, buffer = offset - reader.start, reader.buffer
        if at < 0 or at + BLOCK > len(buffer):
            if len(reader.read(offset, BLOCK)) < BLOCK:
                raise _truncated(offset, length)
            at, buffer = 0, reader.buffer
        # Fast path: nearly every header belongs to a file and has the form that all writers share. The code below it
        # would give the same result, more slowly.
        stop, digits = buffer.find(0, at, at + 100), buffer[at + 124 : at + 135]
        if (
            name is None is size
            and stop > at
            and not digits.strip(b"01234567")
            and buffer[at + 135] in b"\0 "
            and buffer[at + 156] == _FILE
            and buffer[at + 257 : at + 262] == b"ustar"
            and not buffer[at + 345]
        ):
            start = offset + BLOCK
            end = start + int(digits, 8)
            if end > length:
                raise _truncated(offset, length)
            yield _new_tuple(Member, (buffer[at:stop], start, end - start, False))
            offset = (end + BLOCK - 1) // BLOCK * BLOCK
            continue
        header = buffer[at : at + BLOCK]
        if header == _ZEROS:
            return
        own_size, kind = _parse_size(header, offset), header[156]
        if kind in _WITHOUT_DATA:
            offset, name, size = offset + BLOCK, None, None
            continue
        start = offset + BLOCK
        # A size from a pax header counts for the file that follows, not for further extra headers.
        end = start + (own_size if size is None or kind in b"LKxg" else size)
        if end > length:
            raise _truncated(offset, length)
        if kind == ord("L"):  # GNU long name
            name = reader.read(start, own_size).split(b"\0", 1)[0]
        elif kind == ord("x"):  # pax header of the next member
            records = _parse_pax(reader.read(start, own_size))
            name = records.get(b"path", name)
            size = _parse_pax_size(records[b"size"], offset) if b"size" in records else size
        elif kind == ord("S"):
            raise TarError(f"has a sparse member at byte {offset}", "write it without --sparse")
        elif kind not in b"Kg":  # not a GNU long link or a global pax header, which are skipped
            yield Member(name or header_name(header), start, end - start, name is not None)
            name, size = None, None
        offset = -(-end // BLOCK) * BLOCK


def _parse_size(header: bytes, offset: int) -> int:
    """Return the size in a header.

    Raises:
        TarError: it is not a header.
    """
    field = header[124:136]
    try:
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.rstrip(b" \0") or b"0", 8)
        # All archives of this century have the magic. For older ones the checksum decides.
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
            raise TarError(f"is compressed ({program}), so single samples cannot be read", "unpack it to .tar")
    raise TarError("is not a tar archive", "give tar shards or a folder of images")


def _truncated(offset: int, length: int) -> TarError:
    return TarError(
        f"is cut short: it ends at byte {length}, within the member at byte {offset}",
        "copy or pack it again; if it is complete, `truncate -s +1024` adds the missing end-of-archive marker",
    )


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    """Return the records of a pax header: `length key=value newline`, where the length includes itself."""
    records: dict[bytes, bytes] = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or len(digits) > _MAX_DIGITS or int(digits) <= len(digits):
            break
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key], data = value, data[int(digits) :]
    return records


def _parse_pax_size(digits: bytes, offset: int) -> int:
    if digits.isdigit() and len(digits) <= _MAX_DIGITS:
        return int(digits)
    raise TarError(f"is damaged: the size in the header at byte {offset} is not a number", "copy or pack it again")


def _parse_cls(text: bytes) -> int:
    """Return the integer in a .cls member, or -1. `Source.require_labels` reports which labels are missing."""
    text = text.strip()
    return int(text) if text.isdigit() and len(text) < 10 else -1


def _parse_json_label(text: bytes) -> int:
    try:
        values = json.loads(text)
    except ValueError:
        return -1
    if not isinstance(values, dict):
        return -1
    label = values.get("label", values.get("cls"))
    return label if type(label) is int and 0 <= label < 2**31 else -1
