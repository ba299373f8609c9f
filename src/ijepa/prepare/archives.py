"""Sources of images to pack: official archives, folders, lists.

* ImageNet-22k: `winter21_whole.tar.gz` or `fall11_whole.tar`, a tar of class tars or of class folders. A compressed
  archive can only be read from its beginning, so it is first expanded into a plain tar. Images are not unpacked.
* ImageNet-1K: the train tar, the flat validation tar and the development kit.
* Folders: everything that `--data.path` accepts, with one split or several. Parquet files are first converted to a tar.
* Lists: see `file_lists`.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from os import fsdecode
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ijepa.data.open import open_dataset
from ijepa.data.paths import Shards, find_splits
from ijepa.data.sources.base import FolderSource, Source, TarSource
from ijepa.data.sources.index import Arrays, FileDigest, Index, build, cached_index, require_regular
from ijepa.data.sources.nested_tar import first_name, nested_index
from ijepa.data.sources.parquet import ParquetSource
from ijepa.data.sources.tar_index import BLOCK, IMAGE_FIELDS, TarError, open_tar, walk
from ijepa.prepare.file_lists import list_index
from ijepa.prepare.shard_writer import Record, write_shard
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import atomic_file, write_errors
from ijepa.utils.progress import Progress, ProgressMeter

_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_CHUNK = 2**24


def open_archives(
    kind: str, paths: Sequence[Path], spool: Path, devkit: Path | None, progress: Progress, split: str | None = None
) -> dict[str, Source]:
    """Return the sources to pack, by split.

    Args:
        kind: imagenet22k, imagenet1k, folder or list.
        paths: one path, or the train and the validation archive of ImageNet-1K.
        spool: folder for the plain tars that compressed archives and parquet files are converted to.
        devkit: development kit of ImageNet-1K.
        progress: receives progress lines.
        split: the split to read if a folder has several, otherwise the name of the split to write (default: train).

    Raises:
        UserError: archives that are missing, damaged, or of a different kind.
        RunError: a tar cannot be written.
    """
    for path in paths:
        if not path.exists():
            raise UserError(path, "does not exist")
    if kind == "imagenet1k" and len(paths) == 2:
        if split is not None:
            raise UserError(
                "--split", "selects one split, but two archives are given", "give one archive, or remove --split"
            )
        kit = None if devkit is None else str(devkit)
        train, val = map(str, paths)
        return {
            "train": open_dataset(train, where=train, split="train", require_labels=True),
            "val": open_dataset(val, where=val, split="val", devkit=kit, require_labels=True),
        }
    if len(paths) != 1:
        takes = "the train and the validation archive" if kind == "imagenet1k" else "one path"
        raise UserError(kind, f"takes {takes}, not {len(paths)} paths")
    (path,) = paths
    where, name = str(path), split or "train"
    if kind == "imagenet1k":
        return {name: open_dataset(where, where=where, split="train", require_labels=True)}
    if kind == "folder":
        splits = find_splits(path)
        if split is None and splits:
            return {each: _folder(path, each, spool, progress) for each in splits}
        return {name: _folder(path, split, spool, progress)}
    if kind == "list":
        return {name: FolderSource(list_index(path))}
    require_regular(path, path.stat(), where)
    plain = expand(path, spool, progress)
    nested = first_name(plain).endswith(".tar") or _holds_tars(plain)
    meter = ProgressMeter(progress, f"indexing {plain.name}", plain.stat().st_size, "GB", 1e9)
    index = nested_index(plain, where, meter.update) if nested else folders_index(plain, where, meter.update)
    return {name: TarSource(index)}


def _folder(path: Path, split: str | None, spool: Path, progress: Progress) -> Source:
    source = open_dataset(path, where=str(path), split=split)
    return _to_tar(source, spool, progress) if isinstance(source, ParquetSource) else source


def _to_tar(source: ParquetSource, spool: Path, progress: Progress) -> Source:
    """Write the images of parquet files to a tar, unless it exists, and return that as a source.

    Packing reads in random order, and each image of a parquet file would cost reading its row group.
    """
    plain = spool / f"parquet-{source.stamp}.tar"
    if not plain.is_file():
        spool.mkdir(parents=True, exist_ok=True)
        meter = ProgressMeter(progress, "converting to a tar: images", len(source))

        def records() -> Iterator[Record]:
            for index in range(len(source)):
                yield Record(f"{index:09d}", source.image(index), source.label(index))
                meter.update(index + 1)

        write_shard(plain, records())
    index = build(Shards(spool, (plain,)), str(plain))
    header = {**index.header, "classes": source.classes, "fingerprint": source.fingerprint, "stamp": source.stamp}
    return TarSource(Index(header, index.arrays))


def expand(path: Path, spool: Path, progress: Progress) -> Path:
    """Return the path of a plain tar: `path` itself, or the tar in `spool` that it is expanded into, unless it exists.

    Raises:
        UserError: a damaged archive.
        RunError: the archive cannot be read, or the tar cannot be written.
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
    meter = ProgressMeter(progress, f"expanding {path.name}", stat.st_size, "MB", 1e6)
    with path.open("rb") as raw, opener(raw) as packed, write_errors(plain), atomic_file(plain) as out:
        while True:
            try:
                block = packed.read(_CHUNK)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise RunError(f"{path}: {error.strerror}") from None
                raise UserError(path, f"is damaged: {error}", "download it again") from None
            if not block:
                break
            out.write(block)
            meter.update(raw.tell())
    return plain


def folders_index(path: Path, where: str, progress: Callable[[int], None] = lambda offset: None) -> Index:
    """Return the index of a tar of class folders; `progress` receives the offsets of the images.

    Raises:
        UserError: the file is damaged or contains no images in folders.
    """
    digest = FileDigest("tar of folders", None)
    digest.add(path.name, path.stat())

    def make() -> Index:
        names: list[str] = []
        places: list[tuple[int, int]] = []
        try:
            with open_tar(path) as reader:
                for member in walk(reader):
                    if member.name.rpartition(b".")[2].lower() in IMAGE_FIELDS:
                        names.append(PurePosixPath(fsdecode(member.name)).parent.name)
                        places.append((member.offset // BLOCK, member.size))
                        progress(member.offset)
        except TarError as error:
            raise UserError(where, f"{path} {error}", error.hint) from error
        classes, labels = np.unique(np.array(names), return_inverse=True)
        if not names or not all(classes):
            raise UserError(where, f"{path} contains no images in class folders")
        table = np.array(places, dtype=np.uint32)
        arrays: Arrays = {
            "first": np.array([0, len(names)]),
            "block": np.ascontiguousarray(table[:, 0]),
            "size": np.ascontiguousarray(table[:, 1]),
            "label": labels.astype(np.int32),
        }
        header = {"root": str(path.parent), "shards": [path.name], "classes": classes.tolist()}
        return Index({**header, **digest.header(arrays)}, arrays)

    return cached_index(path, digest.stamp(), make)


def _holds_tars(path: Path) -> bool:
    """Whether one of the first entries of a tar is a tar; folders may come before it."""
    try:
        with open_tar(path) as reader:
            return any(member.name.endswith(b".tar") for member in islice(walk(reader), 10))
    except TarError:
        return False
