"""The index of a data set: where each sample lies, in a few flat arrays, built once and memory-mapped.

Fourteen million samples in tars take 12 bytes each (a place in 512-byte blocks, a size, a label): which shard a
sample is in follows from where each shard starts, and names are read from the tar headers when somebody asks. Image
folders need the names. There are no Python objects a sample, and worker processes share the pages of one copy.

An index is kept in a cache (`IJEPA_CACHE`, else ~/.cache/ijepa/index) at an address made of the data's path and of its
*stamp*: names, sizes and modification times of every file. So one that is found is valid, and one whose data have
changed is never found. It is written beside and renamed. A lock lets one process of a machine build it while others,
such as the ranks of a run, wait and then load it. Where the cache cannot be written the arrays stay in memory and
travel to the workers.

The *fingerprint* of a data set has no times, so that a copy of the files has the same one: names and sizes in their
order and, of shards, where each sample lies in them and its label.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.data.paths import Folder, Shards
from ijepa.data.sources.tar_index import Shard, TarError, scan_tar
from ijepa.utils.cores import available_cores
from ijepa.utils.errors import UserError
from ijepa.utils.files import irregular

VERSION = 2
SUFFIXES = ("jpg", "jpeg", "png", "webp")
MASK_SUFFIX = ".mask.png"

_MANY, _MOST_SCANNERS = 64, 16
"""From how many shards on they are scanned by several processes, and by how many at most."""
_KEPT_SECONDS = 30 * 86400
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Index:
    """Arrays by name and a header of plain values; `directory` is where they are mapped from, if they are.

    Shards: header `shards`; arrays `first` (shards + 1,) int64, the number of the first sample of each;
    `block`, `size`, `label`, `mask_block`, `mask_size` as in `tars.Shard`; `renamed` (r,) int64 sample numbers and
    `renamed_names`, `renamed_ends`. Folders: `names`, `ends`, `label`, `mask_names`, `mask_ends`. A text array is
    one (bytes,) uint8 and the (n,) int64 ends of its items. Arrays that would be empty or all missing are left out.
    """

    header: dict[str, Any]
    arrays: Arrays
    directory: Path | None = None

    def __reduce__(self) -> tuple[Callable[..., "Index"], tuple[Any, ...]]:
        if self.directory is not None:
            return load, (self.directory,)
        return Index, (self.header, self.arrays)


def text_item(arrays: Arrays, name: str, ends: str, index: int) -> str:
    """Return item `index` of a text array."""
    stops = arrays[ends]
    start = int(stops[index - 1]) if index else 0
    return os.fsdecode(arrays[name][start : int(stops[index])].tobytes())


def load(directory: Path) -> Index:
    """Map a stored index."""
    header = json.loads((directory / "index.json").read_text())
    arrays = {
        # A plain view: indexing np.memmap costs three times as much.
        name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
        for name in header["arrays"]
    }
    return Index(header, arrays, directory)


def build(files: Shards | Folder, where: str) -> Index:
    """Return the index of these files, from the cache or new.

    Raises:
        UserError: a shard that cannot be read whole, or nothing in it that is an image.
    """
    if isinstance(files, Shards):
        return _shard_index(files, where)
    return _folder_index(files, where)


def cache_root() -> Path:
    """Return the folder of all cached indexes."""
    given = os.environ.get("IJEPA_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "ijepa") / "index"


def _shard_index(files: Shards, where: str) -> Index:
    stats = []
    for path in files.paths:
        try:
            stats.append(path.stat())
        except OSError as error:
            raise UserError(where, f"{path} cannot be read: {error.strerror}") from error
        require_regular(path, stats[-1], where)
    names = [str(path.relative_to(files.root)) for path in files.paths]
    classes = _read_classes(files.root)
    digest = _Digest("shards", classes)
    for name, stat in zip(names, stats, strict=True):
        digest.file(name, stat)

    def make() -> Index:
        shards = _scan_all(files.paths, where)
        if not any(len(shard.block) for shard in shards):
            fields = sorted({field for shard in shards for field in shard.other_fields})
            inner = "archives within archives: `ijepa data pack` makes shards of them" if "tar" in fields else ""
            found = f" (found {', '.join('.' + f for f in fields[:4])})" if fields else ""
            raise UserError(where, f"{_several(files.paths)} holds no images{found}", inner)
        arrays = _join(shards)
        header = {"root": str(files.root), "shards": names, "classes": classes, **digest.header(arrays)}
        return Index(header, arrays)

    return _cached(files.root, digest.stamp(), make)


def _scan_all(paths: tuple[Path, ...], where: str) -> list[Shard]:
    """Scan shards, many of them by several processes: the disk answers many questions at once better than one."""
    processes = min(_MOST_SCANNERS, available_cores())
    if len(paths) < _MANY or processes < 2:
        return [_scan(path, where) for path in paths]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(partial(_scan, where=where), paths, chunksize=8))


def _scan(path: Path, where: str) -> Shard:
    try:
        return scan_tar(path)
    except TarError as error:
        raise UserError(where, f"{path} {error}", error.hint) from error
    except OSError as error:
        raise UserError(where, f"{path} cannot be read: {error.strerror}") from error


def _join(shards: list[Shard]) -> Arrays:
    counts = np.array([len(shard.block) for shard in shards], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(counts)])
    arrays: Arrays = {"first": first}
    for name in ("block", "size", "label", "mask_block", "mask_size"):
        arrays[name] = np.concatenate([getattr(shard, name) for shard in shards])
    renamed = {int(start) + i: name for start, s in zip(first, shards, strict=False) for i, name in s.renamed.items()}
    if renamed:
        arrays["renamed"] = np.array(list(renamed), dtype=np.int64)
        arrays["renamed_names"], arrays["renamed_ends"] = _text([os.fsdecode(name) for name in renamed.values()])
    if not arrays["mask_size"].any():
        del arrays["mask_block"], arrays["mask_size"]
    if (arrays["label"] < 0).all():
        del arrays["label"]
    return arrays


def _folder_index(files: Folder, where: str) -> Index:
    """Index a folder of image files. It is walked at every start: nothing less would notice a changed file."""
    classes = [] if files.masks else _subfolders(files.root)
    digest = _Digest("masks" if files.masks else "folder", classes)
    names: list[str] = []
    masks: dict[str, str] = {}
    others: Counter[str] = Counter()
    for root in filter(None, (files.root, files.masks)):
        for name, stat in _walk(root, where):
            stem, _, suffix = name.rpartition(".")
            suffix = suffix.lower()
            if root == files.masks and suffix == "png":
                masks[stem] = name
            elif root == files.masks:
                continue
            elif name.lower().endswith(MASK_SUFFIX):
                masks[name[: -len(MASK_SUFFIX)]] = name
            elif suffix in SUFFIXES:
                names.append(name)
            else:
                others[f".{suffix}" if stem else "without a suffix"] += 1
                continue
            require_regular(root / name, stat, where)
            digest.file(name, stat)
    if not names:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(4))
        problem = f"{files.root} holds no images" + (f" (found {found})" if found else "")
        raise UserError(where, problem, "images are " + " ".join(f".{suffix}" for suffix in SUFFIXES))

    def make() -> Index:
        arrays: Arrays = {}
        arrays["names"], arrays["ends"] = _text(names)
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number.get(name.partition("/")[0], -1) for name in names], dtype=np.int32)
        if (labels >= 0).any():
            arrays["label"] = labels
        if masks:
            matching = [masks.get(name.rpartition(".")[0], "") for name in names]
            arrays["mask_names"], arrays["mask_ends"] = _text(matching)
        header = {
            "root": str(files.root),
            "masks": str(files.masks or files.root),
            "classes": classes if "label" in arrays else None,
            **digest.header(),
        }
        return Index(header, arrays)

    return _cached(files.root, digest.stamp(), make)


def require_regular(path: Path, stat: os.stat_result, where: str) -> None:
    """Refuse a file that is not a regular one, with links followed.

    Raises:
        UserError: it is a FIFO, a socket, a device or a folder.
    """
    kind = irregular(stat.st_mode)
    if kind is not None:
        raise UserError(where, f"{path} is {kind}, not a regular file", "remove it")


def _walk(root: Path, where: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield (name relative to root, stat) of all files below it, sorted folder by folder, links followed."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        try:
            stat = (root / folder).stat()
            place = (stat.st_dev, stat.st_ino)
            if place in above:
                continue  # a link that leads back
            inner = []
            for entry in _entries(root / folder):
                if entry.is_dir():
                    inner.append(f"{folder}{entry.name}/")
                else:
                    yield folder + entry.name, entry.stat()
            pending.extend((name, above | {place}) for name in reversed(inner))
        except OSError as error:
            raise UserError(where, f"{error.filename or root / folder} cannot be read: {error.strerror}") from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _subfolders(root: Path) -> list[str]:
    return [entry.name for entry in _entries(root) if entry.is_dir()]


def _read_classes(root: Path) -> list[str] | None:
    path = root / "classes.txt"
    return (
        [line.strip() for line in os.fsdecode(path.read_bytes()).splitlines() if line.strip()]
        if path.is_file()
        else None
    )


def _text(items: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    encoded = [os.fsencode(item) for item in items]
    ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), ends


def _several(paths: tuple[Path, ...]) -> str:
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


class _Digest:
    """What a data set is, as far as its files tell: a fingerprint without times and a stamp with them."""

    def __init__(self, kind: str, classes: list[str] | None) -> None:
        start = json.dumps([VERSION, kind, classes]).encode()
        self._lasting, self._timed = (hashlib.blake2b(start, digest_size=16) for _ in range(2))

    def file(self, name: str, stat: os.stat_result) -> None:
        self._lasting.update(b"%s\0%d\n" % (os.fsencode(name), stat.st_size))
        self._timed.update(b"%s\0%d %d\n" % (os.fsencode(name), stat.st_size, stat.st_mtime_ns))

    def stamp(self) -> str:
        """Return what changes when a file's name, size or time does."""
        return self._timed.hexdigest()

    def header(self, arrays: Arrays | None = None) -> dict[str, str]:
        """Return the two as entries of an index's header; `arrays` (what lies where) add to the fingerprint."""
        lasting = self._lasting.copy()
        for name in sorted(arrays or ()):
            array = np.ascontiguousarray(arrays[name])  # type: ignore[index]
            lasting.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
        return {"fingerprint": lasting.hexdigest(), "stamp": self.stamp()}


def derived(*parts: "Index | str") -> dict[str, str]:
    """Return fingerprint and stamp of a data set that is made of others and of texts, for its index's header."""

    def combined(key: str) -> str:
        texts = [part.header[key] if isinstance(part, Index) else part for part in parts]
        joined = "\0".join(texts).encode(errors="surrogateescape")
        return hashlib.blake2b(joined, digest_size=16).hexdigest()

    return {key: combined(key) for key in ("fingerprint", "stamp")}


def _cached(root: Path, stamp: str, make: Callable[[], Index]) -> Index:
    """Return the index from the cache, or make it while other processes that want the same one wait."""
    family = cache_root() / hashlib.blake2b(os.fsencode(root), digest_size=16).hexdigest()
    directory = family / stamp
    with contextlib.ExitStack() as held:
        if not directory.is_dir():
            with contextlib.suppress(OSError):  # a cache that cannot be written, or a file system without locks
                locks = cache_root().with_name("locks")
                locks.mkdir(parents=True, exist_ok=True)
                fcntl.flock(held.enter_context((locks / family.name).open("w")), fcntl.LOCK_EX)
        return _load_or_make(directory, make)


def _load_or_make(directory: Path, make: Callable[[], Index]) -> Index:
    if directory.is_dir():
        try:
            index = load(directory)
        except (OSError, EOFError, ValueError, KeyError):  # a torn copy, as after a power failure: made again
            shutil.rmtree(directory, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.utime(directory)  # in use, see _prune
            return index
    index = make()
    try:
        return _store(index, directory)
    except OSError:
        return index


def _store(index: Index, directory: Path) -> Index:
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".new-", dir=directory.parent))
    try:
        for name, array in index.arrays.items():
            with (beside / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        header = {**index.header, "arrays": sorted(index.arrays)}
        (beside / "index.json").write_text(json.dumps(header))
        with contextlib.suppress(OSError):  # somebody was faster: his is as good
            beside.rename(directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _prune(directory)
    return load(directory)


def _prune(directory: Path) -> None:
    """Remove what has stood beside this index, unused, for a month: earlier states of the same data."""
    for other in directory.parent.iterdir():
        with contextlib.suppress(OSError):
            if other != directory and time.time() - other.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
