"""One interface to all data sets: sample number -> bytes, label, mask.

A source has no state except its index and some open files. So it can be copied into any number of worker processes: a
mapped index is sent as the name of its folder, and files are opened where they are read. Reads give their own offset
(pread), so that threads do not disturb each other.
"""

import errno
import os
import resource
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.data.sources.index import Index
from ijepa.data.sources.tar_index import BLOCK, header_name
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import irregular
from ijepa.utils.names import printable

RETRY_SECONDS = 1.0
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
"""Errors of network disks that are busy or were mounted again."""
_LABEL_HINT = (
    "in a tree of class folders, each folder name is a label; in shards, KEY.cls or KEY.json next to each image"
)
_MASK_HINT = "give images/ and masks/ with matching names (masks as .png), or shards with KEY.mask.png"


@dataclass(frozen=True)
class Sample:
    """One sample as stored: `image` and `mask` are file contents, not yet decoded."""

    name: str
    image: bytes
    label: int | None
    mask: bytes | None


class Source(ABC):
    """A data set: `len(source)`, `source[index]`, and what is known without reading an image.

    Attributes:
        labels: (n,) int32, -1 if a sample has none; None if no sample has one.
        classes: printable names of the classes, if they have names.
        has_masks: whether any sample has a mask.
        annotation: the label map of the masks, a name or a file, if the layout of the data set determines it.
        fingerprint: changes with a file's name, size or place in the order; a copy has the same one.
        stamp: changes with a file's time, too.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.labels: npt.NDArray[np.int32] | None = index.arrays.get("label")
        classes = index.header["classes"]
        self.classes: tuple[str, ...] | None = tuple(map(printable, classes)) if classes else None
        self.annotation: str | None = index.header.get("annotation")
        self.fingerprint: str = index.header["fingerprint"]
        self.stamp: str = index.header["stamp"]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index,)

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.name(index), self.image(index), self.label(index), self.mask(index))

    def name(self, index: int) -> str:
        """Return the sample's printable name: the path below the data's root, including the shard if any."""
        return printable(self._name(self._checked(index)))

    def file(self, index: int) -> str:
        """Return the printable path of the file that holds the sample, without reading it."""
        return printable(self._file(self._checked(index)))

    def image(self, index: int) -> bytes:
        """Return the contents of the image file.

        Raises:
            RunError: the file is gone, has shrunk, or cannot be read.
        """
        return self._image(self._checked(index))

    def mask(self, index: int) -> bytes | None:
        """Return the contents of the mask file, if there is one. Raises as `image`."""
        return self._mask(self._checked(index)) if self.has_masks else None

    def label(self, index: int) -> int | None:
        """Return the sample's label, if it has one."""
        label = -1 if self.labels is None else int(self.labels[self._checked(index)])
        return label if label >= 0 else None

    def readahead(self, indices: npt.NDArray[np.int64], report_sample: Callable[[int], None]) -> None:
        """Ask the operating system to read these samples' images in advance, if the source supports it.

        `report_sample` is called with each sample before its file is touched, because that may hang.
        """
        return

    @property
    def has_masks(self) -> bool:
        """Whether any sample has a mask."""
        return "mask_size" in self.index.arrays or "mask_names" in self.index.arrays

    def require_labels(self, where: str) -> npt.NDArray[np.int32]:
        """Return the labels (n,) int32 of a set in which every sample has one; `where` names the set in errors.

        Raises:
            UserError: a sample has no label, or a label that `classes` has no name for.
        """
        if self.labels is None:
            raise UserError(where, "the images have no labels", _LABEL_HINT)
        self._require_all("label", np.flatnonzero(self.labels < 0), where, _LABEL_HINT)
        if self.classes is not None and int(self.labels.max()) >= len(self.classes):
            raise UserError(where, f"label {self.labels.max()} has no name: classes.txt has {len(self.classes)} lines")
        return self.labels

    def require_masks(self, where: str) -> None:
        """Check that every sample has a mask.

        Raises:
            UserError: a sample has none.
        """
        if not self.has_masks:
            raise UserError(where, "the images have no masks", _MASK_HINT)
        self._require_all("mask", self.without_mask(), where, _MASK_HINT)

    def without_mask(self) -> npt.NDArray[np.int64]:
        """Return the samples that have no mask."""
        return np.arange(len(self))

    def _require_all(self, kind: str, missing: npt.NDArray[np.int64], where: str, hint: str) -> None:
        if len(missing):
            first = self.name(int(missing[0]))
            raise UserError(where, f"{len(missing)} of {len(self)} images have no {kind}, the first is {first}", hint)

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return index

    @abstractmethod
    def _name(self, index: int) -> str: ...

    def _file(self, index: int) -> str:
        return self._name(index)

    @abstractmethod
    def _image(self, index: int) -> bytes: ...

    def _mask(self, index: int) -> bytes | None:
        return None


class TarSource(Source):
    """Samples in tar shards, each read with one pread."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        self._shards = index.header["shards"]
        self._files = OpenFiles([Path(index.header["root"], name) for name in self._shards])

    def __len__(self) -> int:
        return len(self.index.arrays["block"])

    def _name(self, index: int) -> str:
        arrays, shard = self.index.arrays, self._shard(index)
        renamed = arrays.get("renamed")
        if renamed is not None:
            place = int(np.searchsorted(renamed, index))
            if place < len(renamed) and renamed[place] == index:
                return f"{self._shards[shard]}/{self.index.text('renamed_names', place)}"
        header = self._files.read(shard, (int(arrays["block"][index]) - 1) * BLOCK, BLOCK)
        return f"{self._shards[shard]}/{os.fsdecode(header_name(header))}"

    def _image(self, index: int) -> bytes:
        return self._read(index, "block", "size")

    def _mask(self, index: int) -> bytes | None:
        return self._read(index, "mask_block", "mask_size") if self.index.arrays["mask_size"][index] else None

    def _read(self, index: int, block: str, size: str) -> bytes:
        arrays = self.index.arrays
        return self._files.read(self._shard(index), int(arrays[block][index]) * BLOCK, int(arrays[size][index]))

    def _file(self, index: int) -> str:
        return str(self._shards[self._shard(index)])

    def readahead(self, indices: npt.NDArray[np.int64], report_sample: Callable[[int], None]) -> None:
        """See `Source`."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        shards = np.searchsorted(self.index.arrays["first"], indices, side="right") - 1
        blocks, sizes = self.index.arrays["block"][indices], self.index.arrays["size"][indices]
        columns = (array.tolist() for array in (indices, shards, blocks, sizes))
        for index, shard, block, size in zip(*columns, strict=True):
            report_sample(index)
            self._files.readahead(shard, block * BLOCK, size)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.index.arrays["first"], index, side="right")) - 1

    def without_mask(self) -> npt.NDArray[np.int64]:
        """See `Source`."""
        return np.flatnonzero(self.index.arrays["mask_size"] == 0)


class FolderSource(Source):
    """Samples in one file each."""

    def __len__(self) -> int:
        return len(self.index.arrays["ends"])

    def _name(self, index: int) -> str:
        return self.index.text("names", index)

    def _image(self, index: int) -> bytes:
        # A name may be absolute, so it has to be joined. Path takes four times as long as os.path.join.
        return read_file(os.path.join(self.index.header["root"], self._name(index)))  # noqa: PTH118

    def _mask(self, index: int) -> bytes | None:
        name = self.index.text("mask_names", index)
        return read_file(os.path.join(self.index.header["masks"], name)) if name else None  # noqa: PTH118

    def without_mask(self) -> npt.NDArray[np.int64]:
        """See `Source`."""
        return np.flatnonzero(np.diff(self.index.arrays["mask_ends"], prepend=0) == 0)


class OpenFiles:
    """A limited number of open files; the least recently read one is closed first.

    Threads may read at the same time. A file that is closed here while another thread reads it stays open until that
    read ends, because the thread holds the file object.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.open: OrderedDict[int, FileIO] = OrderedDict()
        # A quarter of what the process may open; the rest is for other files and pipes.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.capacity = max(1, min(len(paths), limit // 4 if limit > 0 else 256))

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of a file, given by its number.

        Raises:
            RunError: the file cannot be read, or has shrunk.
        """

        def pread() -> bytes:
            handle = self._handle(file)  # a reference until the read ends
            return os.pread(handle.fileno(), size, offset)

        path = self.paths[file]
        try:
            # A file that was open before a remount stays broken, so it is opened again.
            data = retry_once(pread, lambda: self.open.pop(file, None))
        except OSError as error:
            raise RunError(f"{path}: {error.strerror} (reading {size} bytes at {offset})") from error
        if len(data) < size:
            raise RunError(f"{path} is shorter than when it was indexed: {len(data)} of {size} bytes at {offset}")
        return data

    def readahead(self, file: int, offset: int, size: int) -> None:
        """Begin to read a part of a file. Errors are ignored, because `read` will report them."""
        with suppress(OSError):
            handle = self._handle(file)
            os.posix_fadvise(handle.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def _handle(self, file: int) -> FileIO:
        handle = self.open.get(file)
        if handle is None:
            handle = self.open[file] = FileIO(self.paths[file])
            with suppress(KeyError):  # another thread has closed one at the same time
                while len(self.open) > self.capacity:
                    self.open.popitem(last=False)
        else:
            with suppress(KeyError):  # another thread has just closed this one
                self.open.move_to_end(file)
        return handle


def retry_once(read: Callable[[], bytes], before_retry: Callable[[], object] = lambda: None) -> bytes:
    """Return the result of `read`. After a transient error, call `before_retry`, wait, and read again."""
    try:
        return read()
    except OSError as error:
        if error.errno not in _TRANSIENT:
            raise
    before_retry()
    time.sleep(RETRY_SECONDS)
    return read()


def read_file(path: str | Path) -> bytes:
    """Return the contents of a file; empty if it is not a regular file, so that decoding it fails.

    Raises:
        RunError: it is gone or cannot be read.
    """
    try:
        return retry_once(partial(_read_whole, path))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error


def _read_whole(path: str | Path) -> bytes:
    """Read a file with one call: half the time of Path.read_bytes, which reads until nothing more comes."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits until another process writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        if irregular(os.stat(path).st_mode):  # noqa: PTH116  # a socket cannot be opened
            return b""
        raise
    try:
        found = os.fstat(descriptor)
        if irregular(found.st_mode):
            return b""
        size = found.st_size
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):  # beyond 2 GB, or interrupted
            data += more
        return data
    finally:
        os.close(descriptor)
