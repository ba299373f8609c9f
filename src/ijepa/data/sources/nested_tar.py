"""Index a tar of class tars, as in the download of ImageNet's training set. Nothing is unpacked.

ILSVRC2012_img_train.tar holds a thousand uncompressed tars, one per class and named after it. Members of a tar begin at
multiples of 512 bytes, so members of an inner tar do too. Their offset in the outer file is therefore enough to read
them, and the result is the index of one shard.
"""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from ijepa.data.sources.index import Arrays, FileDigest, Index, cached_index
from ijepa.data.sources.tar_index import BLOCK, IMAGE_FIELDS, TarError, open_tar, walk
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_errors


def first_name(path: Path) -> str:
    """Return the name of a tar's first member, or "" if it has none, is not a tar, or cannot be read."""
    try:
        with open_tar(path) as reader:
            first = next(walk(reader), None)
    except (OSError, TarError):
        return ""
    return "" if first is None else os.fsdecode(first.name)


def nested_index(path: Path, where: str, progress: Callable[[int], None] = lambda offset: None) -> Index:
    """Return the index of a tar of class tars; its classes are the names of the tars, sorted.

    Args:
        path: the outer tar.
        where: the key or flag of the path, for errors.
        progress: called with the byte offset of each inner tar.

    Raises:
        UserError: the file or a tar in it is damaged, or holds no images.
    """
    digest = FileDigest("nested", None)
    digest.add(path.name, path.stat())

    def make() -> Index:
        rows = _image_rows(path, where, progress)
        classes = sorted({name for name, _, _ in rows})
        number = {name: i for i, name in enumerate(classes)}
        table = np.array([(number[name], offset // BLOCK, size) for name, offset, size in rows])
        arrays: Arrays = {
            "first": np.array([0, len(rows)], dtype=np.int64),
            "block": table[:, 1].astype(np.uint32),
            "size": table[:, 2].astype(np.uint32),
            "label": table[:, 0].astype(np.int32),
        }
        header = {"root": str(path.parent), "shards": [path.name], "classes": classes, **digest.header(arrays)}
        return Index(header, arrays)

    return cached_index(path, digest.stamp(), make)


def _image_rows(path: Path, where: str, progress: Callable[[int], None]) -> list[tuple[str, int, int]]:
    """Return (class, offset in the outer tar, size) of all images."""
    rows: list[tuple[str, int, int]] = []
    inner_name = ""  # for errors
    try:
        with read_errors(where, path), open_tar(path) as reader:
            for outer in walk(reader):
                progress(outer.offset)
                if not outer.name.endswith(b".tar"):
                    continue
                inner_name = os.fsdecode(outer.name)
                for member in walk(reader.inner(outer)):
                    if member.name.rpartition(b".")[2].lower() in IMAGE_FIELDS:
                        rows.append((PurePosixPath(inner_name).stem, outer.offset + member.offset, member.size))
                inner_name = ""  # an error in the next header is one of the outer tar
    except TarError as error:
        place = f", member {inner_name}," if inner_name else ""
        raise UserError(where, f"{path}{place} {error}", error.hint) from error
    if not rows:
        raise UserError(where, f"{path} contains no images in its inner tar files")
    return rows
