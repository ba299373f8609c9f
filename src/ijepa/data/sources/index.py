"""The index of a data set: where each sample is, in a few flat arrays, built once and memory-mapped.

14 million samples in tars take 12 bytes each (an offset in 512-byte blocks, a size, a label). The shard of a sample
follows from the first sample of each shard, and names are read from the tar headers when they are needed. Folders need
their names. There are no Python objects per sample, and worker processes share the pages of one copy.

An index is cached (in `IJEPA_CACHE`, or in ~/.cache/ijepa/index). Its address consists of the path of the data and a
*stamp*: names, sizes and modification times of all files. So an index that is found is valid, and the index of changed
data is never found. A file lock lets one process of a machine build it while the others, such as the ranks of a run,
wait and then load it. If the cache cannot be written, the arrays stay in memory and are copied to the workers.

The *fingerprint* of a data set contains no times, so that a copy of the files has the same one: names and sizes in
order and, for shards, the place and label of each sample.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from ijepa.utils.files import atomic_dir, irregular, read_errors

VERSION = 2
SUFFIXES = ("jpg", "jpeg", "png", "webp")
MASK_SUFFIX = ".mask.png"

_PARALLEL_SHARDS, _MAX_SCANNERS = 64, 16
"""Several processes scan the shards from this number of shards on, and this is the largest number of processes."""
_MAX_UNUSED_SECONDS = 30 * 86400
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Index:
    """Arrays by name, a header of plain values, and the directory that they are mapped from, if any.

    Shards: header `shards`; arrays `first` (shards + 1,) int64, the number of the first sample of each;
    `block`, `size`, `label`, `mask_block`, `mask_size` as in `tar_index.Shard`; `renamed` (r,) int64 sample numbers and
    the text array `renamed_names`. Folders: text arrays `names` and `mask_names`, and `label`. Arrays that would be
    empty, or would say "none" for every sample, are left out.

    A text array of n items is two arrays: the bytes of all items, `...names` (bytes,) uint8, and where each item ends,
    `...ends` (n,) int64.
    """

    header: dict[str, Any]
    arrays: Arrays
    directory: Path | None = None

    def __reduce__(self) -> tuple[Callable[..., "Index"], tuple[Any, ...]]:
        if self.directory is not None:
            return load, (self.directory,)
        return Index, (self.header, self.arrays)

    def text(self, names: str, item: int) -> str:
        """Return one item of a text array."""
        ends = self.arrays[_ends(names)]
        start = int(ends[item - 1]) if item else 0
        return os.fsdecode(self.arrays[names][start : int(ends[item])].tobytes())

    def texts(self, names: str) -> list[str]:
        """Return all items of a text array."""
        return [self.text(names, item) for item in range(len(self.arrays[_ends(names)]))]


def text_arrays(names: str, items: Sequence[str]) -> Arrays:
    """Return the two arrays of a text array; `names` is `names`, `mask_names` or the like."""
    encoded = [os.fsencode(item) for item in items]
    ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
    return {names: np.frombuffer(b"".join(encoded), dtype=np.uint8), _ends(names): ends}


def _ends(names: str) -> str:
    return names.removesuffix("names") + "ends"


class FileDigest:
    """Hashes of the files of a data set: a fingerprint without modification times, and a stamp with them."""

    def __init__(self, kind: str, classes: list[str] | None) -> None:
        start = json.dumps([VERSION, kind, classes]).encode()
        self._fingerprint, self._stamp = (hashlib.blake2b(start, digest_size=16) for _ in range(2))

    def add(self, name: str, stat: os.stat_result) -> None:
        """Add a file."""
        self._fingerprint.update(b"%s\0%d\n" % (os.fsencode(name), stat.st_size))
        self._stamp.update(b"%s\0%d %d\n" % (os.fsencode(name), stat.st_size, stat.st_mtime_ns))

    def stamp(self) -> str:
        """Return the hash that changes with the name, size or time of a file."""
        return self._stamp.hexdigest()

    def header(self, arrays: Arrays | None = None) -> dict[str, str]:
        """Return both hashes as entries of an index's header; the fingerprint includes `arrays`."""
        fingerprint = self._fingerprint.copy()
        for name, array in sorted((arrays or {}).items()):
            fingerprint.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            fingerprint.update(np.ascontiguousarray(array).tobytes())
        return {"fingerprint": fingerprint.hexdigest(), "stamp": self.stamp()}


def derived_header(*parts: Index | str) -> dict[str, str]:
    """Return fingerprint and stamp of a data set that is made from other indexes and texts."""

    def combined(key: str) -> str:
        texts = [part.header[key] if isinstance(part, Index) else part for part in parts]
        joined = "\0".join(texts).encode(errors="surrogateescape")
        return hashlib.blake2b(joined, digest_size=16).hexdigest()

    return {key: combined(key) for key in ("fingerprint", "stamp")}


def with_labels(index: Index, labels: list[int], classes: list[str]) -> Index:
    """Return an index with other labels, which are places in `classes`."""
    header = {**index.header, "classes": classes, **derived_header(index, *classes, *map(str, labels))}
    return Index(header, {**index.arrays, "label": np.array(labels, dtype=np.int32)})


def require_regular(path: Path, stat: os.stat_result, where: str) -> None:
    """Refuse a file that is not a regular one, with links followed.

    Raises:
        UserError: it is a FIFO, a socket, a device or a folder.
    """
    kind = irregular(stat.st_mode)
    if kind is not None:
        raise UserError(where, f"{path} is {kind}, not a regular file", "remove it")


def build(files: Shards | Folder, where: str) -> Index:
    """Return the index of these files, from the cache or newly built.

    Raises:
        UserError: a file cannot be read, a shard is damaged, or there are no images.
    """
    return _shard_index(files, where) if isinstance(files, Shards) else _folder_index(files, where)


def _shard_index(files: Shards, where: str) -> Index:
    names = [str(path.relative_to(files.root)) for path in files.paths]
    class_file = files.root / "classes.txt"
    classes = None
    if class_file.is_file():
        lines = os.fsdecode(class_file.read_bytes()).splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    # Only stat calls: if the cached index is valid, no shard is opened.
    digest = FileDigest("shards", classes)
    for path, name in zip(files.paths, names, strict=True):
        with read_errors(where, path):
            stat = path.stat()
        require_regular(path, stat, where)
        digest.add(name, stat)

    def make() -> Index:
        shards = _scan_all(files.paths, where)
        if not any(len(shard.block) for shard in shards):
            fields = sorted({field for shard in shards for field in shard.other_fields})
            hint = "to read tar files inside tar files, make shards with `ijepa data pack`" if "tar" in fields else ""
            found = f" (found {', '.join('.' + field for field in fields[:4])})" if fields else ""
            several = f" and {len(files.paths) - 1} more" if len(files.paths) > 1 else ""
            raise UserError(where, f"{files.paths[0]}{several} contains no images{found}", hint)
        arrays = _join(shards)
        header = {"root": str(files.root), "shards": names, "classes": classes, **digest.header(arrays)}
        return Index(header, arrays)

    return cached_index(files.root, digest.stamp(), make)


def _scan_all(paths: tuple[Path, ...], where: str) -> list[Shard]:
    """Scan shards. Several processes scan many shards faster, because a disk serves parallel reads better."""
    processes = min(_MAX_SCANNERS, available_cores())
    if len(paths) < _PARALLEL_SHARDS or processes < 2:
        return [_scan(path, where) for path in paths]
    # Not fork: this process may have threads, which a forked child would inherit in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(partial(_scan, where=where), paths, chunksize=8))


def _scan(path: Path, where: str) -> Shard:
    try:
        with read_errors(where, path):
            return scan_tar(path)
    except TarError as error:
        raise UserError(where, f"{path} {error}", error.hint) from error


def _join(shards: list[Shard]) -> Arrays:
    """Return the arrays of an index of these shards."""
    counts = np.array([len(shard.block) for shard in shards], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(counts)])
    arrays: Arrays = {"first": first}  # shard s has the samples first[s] to first[s + 1] - 1
    for name in ("block", "size", "label", "mask_block", "mask_size"):
        arrays[name] = np.concatenate([getattr(shard, name) for shard in shards])
    renamed = {int(start) + i: name for start, s in zip(first, shards, strict=False) for i, name in s.renamed.items()}
    if renamed:
        arrays["renamed"] = np.array(list(renamed), dtype=np.int64)
        arrays |= text_arrays("renamed_names", [os.fsdecode(name) for name in renamed.values()])
    if not arrays["mask_size"].any():
        del arrays["mask_block"], arrays["mask_size"]
    if (arrays["label"] < 0).all():
        del arrays["label"]
    return arrays


def _folder_index(files: Folder, where: str) -> Index:
    """Index a folder of image files. It is walked at every start, because a changed file changes no folder's time."""
    classes = [] if files.masks else [entry.name for entry in _visible_entries(files.root) if entry.is_dir()]
    digest = FileDigest("masks" if files.masks else "folder", classes)
    names: list[str] = []
    masks: dict[str, str] = {}  # by stem
    others: Counter[str] = Counter()
    for root in filter(None, (files.root, files.masks)):
        for name, stat in _walk(root, where):
            stem, _, suffix = name.rpartition(".")
            suffix = suffix.lower()
            if root == files.masks:
                if suffix != "png":
                    continue
                masks[stem] = name
            elif name.lower().endswith(MASK_SUFFIX):
                masks[name[: -len(MASK_SUFFIX)]] = name
            elif suffix in SUFFIXES:
                names.append(name)
            else:
                others[f".{suffix}" if stem else "without a suffix"] += 1
                continue
            require_regular(root / name, stat, where)
            digest.add(name, stat)
    if not names:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(4))
        problem = f"{files.root} contains no images" + (f" (found {found})" if found else "")
        raise UserError(where, problem, "images are " + " ".join(f".{suffix}" for suffix in SUFFIXES))

    def make() -> Index:
        arrays = text_arrays("names", names)
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number.get(name.partition("/")[0], -1) for name in names], dtype=np.int32)
        if (labels >= 0).any():
            arrays["label"] = labels
        if masks:
            arrays |= text_arrays("mask_names", [masks.get(name.rpartition(".")[0], "") for name in names])
        header = {
            "root": str(files.root),
            "masks": str(files.masks or files.root),
            "classes": classes if "label" in arrays else None,
            **digest.header(),
        }
        return Index(header, arrays)

    return cached_index(files.root, digest.stamp(), make)


def _walk(root: Path, where: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield (name relative to root, stat) of all files below it, sorted folder by folder, links followed."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, ancestors = pending.pop()
        with read_errors(where, root / folder):
            stat = (root / folder).stat()
            identity = (stat.st_dev, stat.st_ino)
            if identity in ancestors:
                continue  # a link to a folder above
            inner = []
            for entry in _visible_entries(root / folder):
                if entry.is_dir():
                    inner.append(f"{folder}{entry.name}/")
                else:
                    yield folder + entry.name, entry.stat()
            # Reversed, because `pending` is a stack: folders are visited in the order of their names.
            pending.extend((name, ancestors | {identity}) for name in reversed(inner))


def _visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def cache_root() -> Path:
    """Return the folder of all cached indexes."""
    given = os.environ.get("IJEPA_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "ijepa") / "index"


def cached_index(root: Path, stamp: str, make: Callable[[], Index]) -> Index:
    """Return the index of `root` from the cache, or make it while other processes that need it wait."""
    family = cache_root() / hashlib.blake2b(os.fsencode(root), digest_size=16).hexdigest()
    directory = family / stamp
    with contextlib.ExitStack() as stack:
        # Without a lock if the index exists, so that the ranks of a run do not wait for each other at every start.
        if not directory.is_dir():
            with contextlib.suppress(OSError):  # a cache that cannot be written, or a file system without locks
                locks = cache_root().with_name("locks")
                locks.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context((locks / family.name).open("w")), fcntl.LOCK_EX)
        if directory.is_dir():  # checked again, because the owner of the lock may have built it in the meantime
            try:
                index = load(directory)
            except (OSError, EOFError, ValueError, KeyError):  # incomplete after a power failure: build it again
                shutil.rmtree(directory, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.utime(directory)  # `_prune` removes unused directories by their time
                return index
        index = make()
        with contextlib.suppress(OSError):
            return _store(index, directory)
        return index


def load(directory: Path) -> Index:
    """Map a stored index."""
    header = json.loads((directory / "index.json").read_text())
    arrays = {
        # As a plain array, because indexing an np.memmap costs three times as much.
        name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
        for name in header["arrays"]
    }
    return Index(header, arrays, directory)


def _store(index: Index, directory: Path) -> Index:
    try:
        with atomic_dir(directory) as folder:
            for name, array in index.arrays.items():
                np.save(folder / f"{name}.npy", array, allow_pickle=False)
            (folder / "index.json").write_text(json.dumps({**index.header, "arrays": sorted(index.arrays)}))
    except OSError:
        if not directory.is_dir():  # without locks, another process may have stored the same index first
            raise
    _prune(directory)
    return load(directory)


def _prune(directory: Path) -> None:
    """Remove earlier states of the same data that were not used for a month."""
    for other in directory.parent.iterdir():
        with contextlib.suppress(OSError):
            if other != directory and time.time() - other.stat().st_mtime > _MAX_UNUSED_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
