"""What people have on their disks, as sources to pack: official archives, folders, lists.

* ImageNet-22k: `winter21_whole.tar.gz` or `fall11_whole.tar`, a tar of class tars (or of class folders). A compressed
  archive can only be read from its beginning, so it is expanded once into a plain tar beside the shards to be, whole
  or not at all; nothing is unpacked into files.
* ImageNet-1K: the train tar, the flat validation tar and the development kit.
* Folders of class folders, and lists: a CSV of `path,label` (a first line `path,label` is passed over), paths from the
  CSV's folder on.
"""

import bz2
import csv
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ijepa.data.index import Arrays, Index, _cached, _Digest
from ijepa.data.nested import first_name, nested_index
from ijepa.data.official import open_set
from ijepa.data.sources import FolderSource, Source, TarSource, open_source
from ijepa.data.tars import BLOCK, IMAGE_FIELDS, TarError, _Window, walk
from ijepa.errors import Refused
from ijepa.prepare.shards import complete_or_absent

KINDS = ("imagenet22k", "imagenet1k", "folder", "list")
Tell = Callable[[str], None]

_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_CHUNK = 2**24


def open_archives(kind: str, paths: Sequence[Path], spool: Path, devkit: Path | None, tell: Tell) -> dict[str, Source]:
    """Return the sources to pack by split; compressed archives are expanded into `spool`.

    Raises:
        Refused: archives that are missing, damaged, or of another kind.
        Failed: the disk refuses the expanded archive.
    """
    for path in paths:
        if not path.exists():
            raise Refused(path, "does not exist")
    if kind == "imagenet1k":
        if not 1 <= len(paths) <= 2:
            raise Refused("imagenet1k", f"takes the train and the validation archive, not {len(paths)} paths")
        kit = None if devkit is None else str(devkit)
        found = {"train": open_set(str(paths[0]), where=str(paths[0]), split="train", labelled=True)}
        if len(paths) == 2:
            found["val"] = open_set(str(paths[1]), where=str(paths[1]), split="val", devkit=kit, labelled=True)
        return found
    if len(paths) != 1:
        raise Refused(kind, f"takes one path, not {len(paths)}")
    (path,) = paths
    if kind == "folder":
        return {"train": open_source(path, where=str(path))}
    if kind == "list":
        return {"train": FolderSource(list_index(path))}
    plain = expanded(path, spool, tell)
    nested = first_name(plain).endswith(".tar") or _holds_tars(plain)
    return {"train": TarSource(nested_index(plain, str(path)) if nested else folders_index(plain, str(path)))}


def expanded(path: Path, spool: Path, tell: Tell) -> Path:
    """Return a plain tar: `path` itself, or the one in `spool` that it is expanded into, once.

    Raises:
        Refused: a damaged archive.
        Failed: the disk refuses.
    """
    with path.open("rb") as file:
        opener = _OPENERS.get(file.read(2))
    if opener is None:
        return path
    stat = path.stat()
    plain = spool / f"{path.name.split('.')[0]}-{stat.st_size}-{stat.st_mtime_ns}.tar"
    if plain.is_file():
        return plain
    spool.mkdir(parents=True, exist_ok=True)
    done = 0
    with opener(path) as packed, complete_or_absent(plain) as out:
        while True:
            try:
                block = packed.read(_CHUNK)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise Refused(path, f"is damaged: {error}", "fetch it again") from None
            if not block:
                break
            out.write(block)
            done += len(block)
            if done // _CHUNK % 64 == 0:
                tell(f"expanding {path.name}: {done / 1e9:.1f} GB")
    return plain


def folders_index(path: Path, where: str) -> Index:
    """Return the index of a tar of class folders: an image's class is the folder that it is in.

    Raises:
        Refused: the file is damaged or holds no images in folders.
    """
    digest = _Digest("tar of folders", None)
    digest.file(path.name, path.stat())

    def make() -> Index:
        names: list[str] = []
        places: list[tuple[int, int]] = []
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for member in walk(_Window(descriptor), os.fstat(descriptor).st_size):
                if member.name.rpartition(b".")[2].lower() in IMAGE_FIELDS:
                    names.append(PurePosixPath(os.fsdecode(member.name)).parent.name)
                    places.append((member.offset // BLOCK, member.size))
        except TarError as error:
            raise Refused(where, f"{path} {error}", error.mend) from error
        finally:
            os.close(descriptor)
        classes, labels = np.unique(np.array(names), return_inverse=True)
        if not names or not all(classes):
            raise Refused(where, f"{path} holds no images in class folders")
        table = np.array(places, dtype=np.uint32)
        arrays: Arrays = {
            "first": np.array([0, len(names)]),
            "block": np.ascontiguousarray(table[:, 0]),
            "size": np.ascontiguousarray(table[:, 1]),
            "label": labels.astype(np.int32),
        }
        header = {"root": str(path.parent), "shards": [path.name], "classes": classes.tolist()}
        return Index({**header, "fingerprint": digest.hex()}, arrays)

    return _cached(path, digest.hex(), make)


def list_index(file: Path) -> Index:
    """Return the index of the images that a CSV of `path,label` lists.

    Raises:
        Refused: a line that is not so, or an image that is not there.
    """
    root = file.absolute().parent
    names, labels = list[str](), list[str]()
    digest = _Digest("list", None)
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.reader(lines), 1):
                if not row or (number == 1 and [cell.strip().lower() for cell in row] == ["path", "label"]):
                    continue
                if len(row) != 2 or not row[0].strip() or not row[1].strip():
                    raise Refused(file, f"line {number} is {','.join(row)[:60]!r}", "write path,label")
                names.append(row[0].strip())
                labels.append(row[1].strip())
                if not (root / names[-1]).is_file():
                    raise Refused(file, f"line {number} names {root / names[-1]}, which is not there")
                digest.file(f"{names[-1]}\0{labels[-1]}", (root / names[-1]).stat())
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(file, f"cannot be read: {error}") from None
    if not names:
        raise Refused(file, "lists no images", "write one path,label a line")
    # Numbers keep their order, words get the alphabet's.
    numbers = all(label.isdecimal() for label in labels)
    classes = sorted(set(labels), key=(lambda label: (int(label), label)) if numbers else None)
    place = {name: index for index, name in enumerate(classes)}
    encoded = [os.fsencode(name) for name in names]
    arrays: Arrays = {
        "names": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
        "label": np.array([place[label] for label in labels], dtype=np.int32),
    }
    header = {"root": str(root), "masks": str(root), "classes": classes, "fingerprint": digest.hex()}
    return Index(header, arrays)


def _holds_tars(path: Path) -> bool:
    """Whether the first files of a tar are tars: its first entries may be folders."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for count, member in enumerate(walk(_Window(descriptor), os.fstat(descriptor).st_size)):
            if member.name.endswith(b".tar"):
                return True
            if count > 8:
                return False
    except TarError:
        return False
    finally:
        os.close(descriptor)
    return False
