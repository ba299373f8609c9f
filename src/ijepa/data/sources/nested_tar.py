"""A tar of class tars, as ImageNet's training set is downloaded: its images, found where they lie, nothing unpacked.

ILSVRC2012_img_train.tar holds a thousand uncompressed tars, one a class and named after it. A tar's members begin at
multiples of 512 bytes, so a member of a member does, too: its place in the outer file is all that reading it takes, and
the result is the index of one shard.
"""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from ijepa.data.sources.index import Arrays, Index, _cached, _Digest
from ijepa.data.sources.tar_index import BLOCK, IMAGE_FIELDS, Member, TarError, _Window, walk
from ijepa.utils.errors import UserError

At = Callable[[int], None]


class _Inner(_Window):
    """A member of a tar, read as if it were a file of its own."""

    def __init__(self, descriptor: int, member: Member) -> None:
        super().__init__(descriptor)
        self.begin, self.length = member.offset, member.size

    def read(self, offset: int, length: int) -> bytes:
        """Return at most `length` bytes from `offset` on, less where the member ends."""
        return super().read(self.begin + offset, max(0, min(length, self.length - offset)))


def first_name(path: Path) -> str:
    """Return the name of a tar's first member, "" where it has none or is no tar."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        first = next(walk(_Window(descriptor), os.fstat(descriptor).st_size), None)
        return "" if first is None else os.fsdecode(first.name)
    except TarError:
        return ""
    finally:
        os.close(descriptor)


def nested_arrays(path: Path, where: str, at: At = lambda offset: None) -> tuple[Arrays, list[str]]:
    """Return where the images of a tar of class tars lie, and the classes' names, sorted.

    `at` is told the byte that has been reached, class by class.

    Raises:
        UserError: the file or a tar in it is damaged, or holds no images.
    """
    rows: list[tuple[str, int, int]] = []
    inside = ""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for outer in walk(_Window(descriptor), os.fstat(descriptor).st_size):
                at(outer.offset)
                inside = os.fsdecode(outer.name)
                if not inside.endswith(".tar"):
                    continue
                for member in walk(_Inner(descriptor, outer), outer.size):
                    if member.name.rpartition(b".")[2].lower() in IMAGE_FIELDS:
                        rows.append((inside, outer.offset + member.offset, member.size))
                inside = ""
        finally:
            os.close(descriptor)
    except TarError as error:
        raise UserError(where, f"{path}{f', in it {inside},' if inside else ''} {error}", error.hint) from error
    except OSError as error:
        raise UserError(where, f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise UserError(where, f"{path} holds no images in its tars")
    classes = sorted({PurePosixPath(tar).stem for tar, _, _ in rows})
    number = {name: i for i, name in enumerate(classes)}
    table = np.array([(number[PurePosixPath(tar).stem], start // BLOCK, size) for tar, start, size in rows])
    return {
        "first": np.array([0, len(rows)], dtype=np.int64),
        "block": table[:, 1].astype(np.uint32),
        "size": table[:, 2].astype(np.uint32),
        "label": table[:, 0].astype(np.int32),
    }, classes


def nested_index(path: Path, where: str, at: At = lambda offset: None) -> Index:
    """Return the index of a tar of class tars. `at` and errors as for `nested_arrays`."""
    digest = _Digest("nested", None)
    digest.file(path.name, path.stat())

    def make() -> Index:
        arrays, classes = nested_arrays(path, where, at)
        header = {"root": str(path.parent), "shards": [path.name], "classes": classes, **digest.header(arrays)}
        return Index(header, arrays)

    return _cached(path, digest.stamp(), make)
