"""One view of all data sets: sample number -> bytes, label, mask.

A source is map-style and holds no state but its index and a few open files, so it can be copied into any number of
worker processes: a mapped index travels as its folder's name, and files are opened where they are read. Reads carry
their own offset (pread), so nothing is shared that could be disturbed.
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

from ijepa.data.sources.index import Index, text_item
from ijepa.data.sources.tar_index import BLOCK, header_name
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import irregular
from ijepa.utils.names import printable


@dataclass(frozen=True)
class Sample:
    """One sample as stored: `image` and `mask` are file contents, not yet decoded."""

    name: str
    image: bytes
    label: int | None
    mask: bytes | None


class Source(ABC):
    """A data set: `len`, `[index]`, and what is known of it without reading an image.

    Attributes:
        labels: (n,) int32, -1 where a sample has none; None where no sample has one.
        classes: printable names of the classes, where they have names.
        has_masks: whether any sample has a mask.
        annotation: the label map that the masks follow, a name or a file, where the data set's layout tells.
        fingerprint: changes when a file's name, size or place in the order does; that of a copy is the same.
        stamp: changes when a file's time does, too.
    """

    annotation: str | None = None

    def __init__(self, index: Index) -> None:
        self.index = index
        self.labels: npt.NDArray[np.int32] | None = index.arrays.get("label")
        classes = index.header["classes"]
        self.classes: tuple[str, ...] | None = tuple(map(printable, classes)) if classes else None
        self.annotation = index.header.get("annotation")
        self.fingerprint: str = index.header["fingerprint"]
        self.stamp: str = index.header["stamp"]

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["index"])  # type: ignore[misc]

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.name(index), self.image(index), self.label(index), self.mask(index))

    def name(self, index: int) -> str:
        """Return the sample's printable name: the file's path below the data's root, through its shard if any."""
        return printable(self._name(self._checked(index)))

    def file(self, index: int) -> str:
        """Return which file holds the sample, below the data's root, printable; found without reading."""
        return printable(self._file(self._checked(index)))

    def image(self, index: int) -> bytes:
        """Return the image file's contents.

        Raises:
            RunError: the file is gone, has shrunk, or cannot be read.
        """
        return self._image(self._checked(index))

    def expect(self, indices: npt.NDArray[np.int64], about: Callable[[int], None] = lambda index: None) -> None:
        """Let the system begin to read these samples' images, all at once, before they are asked for one by one.

        `about` is told of each sample before a file is touched for it, which may hang.
        """
        return

    def mask(self, index: int) -> bytes | None:
        """Return the mask file's contents, if there is one. Raises as `image`."""
        return self._mask(self._checked(index)) if self.has_masks else None

    def label(self, index: int) -> int | None:
        """Return the sample's label, if it has one."""
        label = -1 if self.labels is None else int(self.labels[self._checked(index)])
        return label if label >= 0 else None

    @property
    def has_masks(self) -> bool:
        """Whether any sample has a mask."""
        return "mask_size" in self.index.arrays or "mask_names" in self.index.arrays

    def require_labels(self, where: str) -> npt.NDArray[np.int32]:
        """Return the labels (n,) int32 of a set in which every sample has one; `where` names it to the user.

        Raises:
            UserError: a sample without a label, or one that `classes` has no name for.
        """
        hint = (
            "labels are the folders' names in a tree of class folders; in shards, KEY.cls or KEY.json beside each image"
        )
        if self.labels is None:
            raise UserError(where, "the images have no labels", hint)
        missing = np.flatnonzero(self.labels < 0)
        if len(missing):
            problem = f"{len(missing)} of {len(self)} images have no label, the first is {self.name(int(missing[0]))}"
            raise UserError(where, problem, hint)
        if self.classes is not None and int(self.labels.max()) >= len(self.classes):
            raise UserError(where, f"label {self.labels.max()} has no name: classes.txt has {len(self.classes)} lines")
        return self.labels

    def require_masks(self, where: str) -> None:
        """Check that every sample has a mask.

        Raises:
            UserError: one has none.
        """
        hint = "give images/ and masks/ with matching names (masks as .png), or shards with KEY.mask.png"
        if not self.has_masks:
            raise UserError(where, "the images have no masks", hint)
        missing = self._without_mask()
        if len(missing):
            problem = f"{len(missing)} of {len(self)} images have no mask, the first is {self.name(int(missing[0]))}"
            raise UserError(where, problem, hint)

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

    @abstractmethod
    def _mask(self, index: int) -> bytes | None: ...

    @abstractmethod
    def _without_mask(self) -> npt.NDArray[np.int64]: ...


class TarSource(Source):
    """Samples in tar shards, each read with one pread."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        root = Path(index.header["root"])
        self._shards = index.header["shards"]
        self._files = OpenFiles([root / name for name in self._shards])

    def __len__(self) -> int:
        return len(self.index.arrays["block"])

    def _name(self, index: int) -> str:
        arrays = self.index.arrays
        renamed = arrays.get("renamed")
        shard = self._shard(index)
        if renamed is not None:
            place = int(np.searchsorted(renamed, index))
            if place < len(renamed) and renamed[place] == index:
                return f"{self._shards[shard]}/{text_item(arrays, 'renamed_names', 'renamed_ends', place)}"
        header = self._files.read(shard, (int(arrays["block"][index]) - 1) * BLOCK, BLOCK)
        return f"{self._shards[shard]}/{os.fsdecode(header_name(header))}"

    def _image(self, index: int) -> bytes:
        arrays = self.index.arrays
        return self._files.read(self._shard(index), int(arrays["block"][index]) * BLOCK, int(arrays["size"][index]))

    def _mask(self, index: int) -> bytes | None:
        arrays = self.index.arrays
        if not arrays["mask_size"][index]:
            return None
        offset, size = int(arrays["mask_block"][index]) * BLOCK, int(arrays["mask_size"][index])
        return self._files.read(self._shard(index), offset, size)

    def _file(self, index: int) -> str:
        return str(self._shards[self._shard(index)])

    def expect(self, indices: npt.NDArray[np.int64], about: Callable[[int], None] = lambda index: None) -> None:
        """See `Source`."""
        if not hasattr(os, "posix_fadvise"):  # not on macOS
            return
        shards = np.searchsorted(self.index.arrays["first"], indices, side="right") - 1
        blocks, sizes = self.index.arrays["block"][indices], self.index.arrays["size"][indices]
        columns = (array.tolist() for array in (indices, shards, blocks, sizes))
        for index, shard, block, size in zip(*columns, strict=True):
            about(index)
            self._files.expect(shard, block * BLOCK, size)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.index.arrays["first"], index, side="right")) - 1

    def _without_mask(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.index.arrays["mask_size"] == 0)


class FolderSource(Source):
    """Samples in files of their own."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        self._root, self._masks = Path(index.header["root"]), Path(index.header["masks"])

    def __len__(self) -> int:
        return len(self.index.arrays["ends"])

    def _name(self, index: int) -> str:
        return text_item(self.index.arrays, "names", "ends", index)

    def _image(self, index: int) -> bytes:
        # Joined, since a list's names may be absolute, and not by Path, which takes four times as long.
        return read_file(os.path.join(self._root, self._name(index)))  # noqa: PTH118

    def _mask(self, index: int) -> bytes | None:
        name = text_item(self.index.arrays, "mask_names", "mask_ends", index)
        return read_file(os.path.join(self._masks, name)) if name else None  # noqa: PTH118

    def _without_mask(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(np.diff(self.index.arrays["mask_ends"], prepend=0) == 0)


_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
"""What network disks say when they are busy or were mounted anew: worth a second try."""
RETRY_SECONDS = 1.0


def twice(read: Callable[[], bytes], between: Callable[[], object] = lambda: None) -> bytes:
    """Return what `read` returns; after an error that may pass, do what is to be done between, wait, and read again."""
    try:
        return read()
    except OSError as error:
        if error.errno not in _PASSING:
            raise
    between()
    time.sleep(RETRY_SECONDS)
    return read()


class OpenFiles:
    """A limited number of open shards; the one not read for longest is closed first.

    A file that is closed here while another thread reads it lives until that read ends: it is the object, not its
    number, that is held.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.open: OrderedDict[int, FileIO] = OrderedDict()
        # A quarter of what the process may open: the rest is for everybody else's files and pipes.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.capacity = max(1, min(len(paths), limit // 4 if limit > 0 else 256))

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of a file, by its number."""
        path = self.paths[file]

        def part() -> bytes:
            handle = self._handle(file)  # held until the read ends
            return os.pread(handle.fileno(), size, offset)

        try:
            data = twice(part, lambda: self.open.pop(file, None))  # a file of before a remount stays broken
        except OSError as error:
            raise RunError(f"{path}: {error.strerror} (reading {size} bytes at {offset})") from error
        if len(data) < size:
            raise RunError(f"{path} has shrunk since it was indexed: {len(data)} of {size} bytes at {offset}")
        return data

    def expect(self, file: int, offset: int, size: int) -> None:
        """Begin to read a part of a file; what goes wrong is told when it is read."""
        with suppress(OSError):
            handle = self._handle(file)
            os.posix_fadvise(handle.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def _handle(self, file: int) -> FileIO:
        handle = self.open.get(file)
        if handle is None:
            handle = self.open[file] = FileIO(self.paths[file])
            with suppress(KeyError):  # another thread was faster
                while len(self.open) > self.capacity:
                    self.open.popitem(last=False)
        else:
            with suppress(KeyError):  # another thread has just closed it
                self.open.move_to_end(file)
        return handle


def read_file(path: str | Path) -> bytes:
    """Return a file's contents; none if it is not a regular file, so that no image can be decoded from it.

    Raises:
        RunError: it is gone or cannot be read.
    """

    try:
        return twice(partial(_contents, path))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error


def _contents(path: str | Path) -> bytes:
    """Read the file in one piece: half the time of Path.read_bytes, which asks for more until there is no more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # or it would wait for a FIFO's writer
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
