"""CIFAR-10 and CIFAR-100 as they are downloaded: python pickles, read without running what they say.

A pickle is a program: it may name any function and have it called. Those of CIFAR hold dictionaries, lists, numbers,
strings and one numpy array, whose rebuilding calls three names of numpy's. Here these three names stand for two classes
of our own that only hold what they are given, and every other name is refused; so nothing in a file is ever called but
those. The pixels lie in the file as they are, row after row, and are read from there, 3,072 bytes an image: a source
holds nothing but labels and names.

An image is handed on as a PPM file of 32 x 32 pixels, since a source's images are contents of image files.
"""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.data.sources.base import OpenFiles, Source
from ijepa.data.sources.image_mask_pairs import text_array
from ijepa.data.sources.index import Arrays, Index, _Digest, text_item
from ijepa.utils.errors import UserError

SIDE = 32
BYTES = 3 * SIDE * SIDE
_HEADER = b"P6 %d %d 255\n" % (SIDE, SIDE)

_TEN: tuple[str, ...] = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "batches.meta": {"train": _TEN, "test": ("test_batch",)},
    "meta": {"train": ("train",), "test": ("test",)},
}
_FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
_UNPACK = "give the folder that the official archive of CIFAR for Python unpacks to"


class _Array:
    """Holds what a pickled numpy array is rebuilt from."""

    def __init__(self, *arguments: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Kind(_Array):
    """Holds what a pickled numpy dtype is rebuilt from, its name first."""

    def __init__(self, name: object = None, *arguments: object) -> None:
        self.name = name


class _Reader(pickle.Unpickler):
    """Reads a pickle of plain values and arrays; any other name in it is an error, before anything is called."""

    def find_class(self, module: str, name: str) -> type:
        """Return the stand-in for one of the three names that numpy's arrays need."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return _Array if name == "ndarray" else _Kind
        raise pickle.UnpicklingError(f"it names {module}.{name}, and holds more than numbers, texts and arrays")


class CifarSource(Source):
    """Images within pickles, each read with one pread."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        root = Path(index.header["root"])
        self._files = OpenFiles([root / name for name in index.header["files"]])

    def __len__(self) -> int:
        return len(self.index.arrays["offset"])

    def _name(self, index: int) -> str:
        return text_item(self.index.arrays, "names", "ends", index)

    def _image(self, index: int) -> bytes:
        arrays = self.index.arrays
        data = self._files.read(int(arrays["file"][index]), int(arrays["offset"][index]), BYTES)
        planes = np.frombuffer(data, dtype=np.uint8).reshape(3, SIDE, SIDE)
        return _HEADER + planes.transpose(1, 2, 0).tobytes()

    def _mask(self, index: int) -> bytes | None:
        return None

    def _without_mask(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self))


def find_cifar(path: Path, where: str, split: str | None) -> CifarSource | None:
    """Return CIFAR-10 or CIFAR-100 at a folder, the folder above it, or one of its batches; None where it is not there.

    Raises:
        UserError: files missing or of another kind, a pickle with code in it, or several splits and none chosen.
    """
    if path.is_file() and path.name.startswith("cifar-") and path.name.endswith((".tar.gz", ".tgz")):
        raise UserError(where, f"{path} is packed", _UNPACK)
    root = next((path / name for name in _FOLDERS if (path / name).is_dir()), path)
    chosen: tuple[str, ...] = () if root.is_dir() else (path.name,)
    root = root if root.is_dir() else path.parent
    meta = next((name for name in _FILES if (root / name).is_file()), None)
    known = _FILES[meta] if meta else {}
    batches = [name for names in known.values() for name in names]
    if meta is None or not any((root / name).is_file() for name in batches) or (chosen and chosen[0] not in batches):
        return None
    if not chosen:
        if split is None:
            raise UserError(
                where, f"{root} holds several splits: train, test", f"choose one, or give {root / batches[-1]}"
            )
        chosen = known["train" if split.startswith("train") else "test"]
    return CifarSource(_index(root, chosen, meta, where))


def _index(root: Path, files: tuple[str, ...], meta: str, where: str) -> Index:
    described = read_pickle(root / meta, where)
    classes = _texts(described.get(b"label_names") or described.get(b"fine_label_names"))
    if not classes:
        raise UserError(where, f"{root / meta} names no classes", _UNPACK)
    labels: list[int] = []
    names: list[str] = []
    offsets, digest = [], _Digest("cifar", [meta, *classes])
    for name in files:
        batch = read_pickle(root / name, where)
        start = _pixels(root / name, batch.get(b"data"), where)
        found = batch.get(b"labels", batch.get(b"fine_labels"))
        if not isinstance(found, list) or not all(type(value) is int and 0 <= value < len(classes) for value in found):
            raise UserError(where, f"{root / name}: its labels are not numbers below {len(classes)}", _UNPACK)
        count = len(batch[b"data"].state[-1]) // BYTES
        if len(found) != count:
            raise UserError(where, f"{root / name} holds {count} images and {len(found)} labels", _UNPACK)
        own = _texts(batch.get(b"filenames"))
        labels.extend(found)
        names.extend(own if len(own) == count else [f"{name}/{row}" for row in range(count)])
        offsets.append(start + BYTES * np.arange(count, dtype=np.int64))
        digest.file(name, (root / name).stat())
    text, ends = text_array(names)
    arrays: Arrays = {
        "label": np.array(labels, dtype=np.int32),
        "file": np.repeat(np.arange(len(files)), [len(part) for part in offsets]),
        "offset": np.concatenate(offsets),
        "names": text,
        "ends": ends,
    }
    header = {"root": str(root), "files": list(files), "classes": classes, **digest.header(arrays)}
    return Index(header, arrays)


def read_pickle(path: Path, where: str) -> dict[bytes, Any]:
    """Return the dictionary a pickle holds, texts of Python 2 as bytes, arrays as stand-ins.

    Raises:
        UserError: no pickle, one of something else, or one that names anything but numpy's arrays: that is not run.
    """
    try:
        held = _Reader(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise UserError(where, f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # the unpickler raises nearly anything on broken bytes
        raise UserError(where, f"{path} is no pickle of CIFAR: {error}", _UNPACK) from error
    if not isinstance(held, dict):
        raise UserError(where, f"{path} is no pickle of CIFAR: it holds no dictionary", _UNPACK)
    return {os.fsencode(key) if isinstance(key, str) else key: value for key, value in held.items()}


def _pixels(path: Path, array: object, where: str) -> int:
    """Return where the pixels begin in the file."""
    state = array.state if isinstance(array, _Array) else None
    if not (
        isinstance(state, tuple)
        and len(state) == 5
        and isinstance(state[2], _Kind)
        and state[2].name in (b"u1", "u1")
        and not state[3]
        and isinstance(state[4], bytes)
        and state[1] == (len(state[4]) // BYTES, BYTES)
    ):
        raise UserError(where, f"{path}: its images are not rows of {BYTES} bytes", _UNPACK)
    start = path.read_bytes().find(state[4])
    if start < 0:
        raise UserError(where, f"{path}: its pixels are not stored as they are", _UNPACK)
    return start


def _texts(values: object) -> list[str]:
    if not isinstance(values, list):
        return []
    return [os.fsdecode(value) for value in values if isinstance(value, bytes | str)]
