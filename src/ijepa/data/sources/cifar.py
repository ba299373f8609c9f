"""CIFAR-10 and CIFAR-100 in their official binary edition.

A file is a sequence of rows: a label byte (CIFAR-100: coarse and fine label), then 3,072 bytes of pixels, as three
planes of 32 x 32. Each image is read with one pread and returned as a PPM file, because the images of a source are
contents of image files. The Python edition consists of pickles, which can run code, and is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ijepa.data.sources.base import OpenFiles, Source
from ijepa.data.sources.index import Arrays, FileDigest, Index
from ijepa.data.split import Split, choose_split
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_errors

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE
_HEADER = b"P6 %d %d 255\n" % (SIDE, SIDE)
_HINT = "download the binary version, cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, and unpack it"


@dataclass(frozen=True)
class _Edition:
    """The files of a data set. A row has `labels` label bytes, whose last one counts."""

    folder: str
    class_names: str
    files: Mapping[Split, tuple[str, ...]]
    labels: int


_EDITIONS = (
    _Edition(
        "cifar-10-batches-bin",
        "batches.meta.txt",
        {Split.TRAIN: tuple(f"data_batch_{i}.bin" for i in range(1, 6)), Split.TEST: ("test_batch.bin",)},
        labels=1,
    ),
    _Edition(
        "cifar-100-binary",
        "fine_label_names.txt",
        {Split.TRAIN: ("train.bin",), Split.TEST: ("test.bin",)},
        labels=2,
    ),
)
_PICKLES = {"batches.meta": "test_batch", "meta": "train"}
"""The Python editions: the file of class names, and one of the other files."""


class CifarSource(Source):
    """Images in CIFAR's binary files; arrays `file` and `offset` (n,) int64 locate each row's pixels."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        root = Path(index.header["root"])
        self._files = OpenFiles([root / name for name in index.header["files"]])

    def __len__(self) -> int:
        return len(self.index.arrays["offset"])

    def _name(self, index: int) -> str:
        header, arrays = self.index.header, self.index.arrays
        row = int(arrays["offset"][index]) // int(header["row_bytes"])
        return f"{header['files'][int(arrays['file'][index])]}/{row:05d}"

    def _image(self, index: int) -> bytes:
        file, offset = (int(self.index.arrays[name][index]) for name in ("file", "offset"))
        planes = np.frombuffer(self._files.read(file, offset, PIXEL_BYTES), dtype=np.uint8)
        return _HEADER + planes.reshape(3, SIDE, SIDE).transpose(1, 2, 0).tobytes()


def find_cifar(path: Path, where: str, split: str | None) -> CifarSource | None:
    """Return CIFAR-10 or CIFAR-100 at a folder, in a sub-folder of it, or in one file; None if it is not there.

    Raises:
        UserError: the Python edition or a packed archive, a damaged file, or several splits and none chosen.
    """
    if path.name.startswith("cifar-") and path.name.endswith((".tar.gz", ".tgz")):
        raise UserError(where, f"{path} is a compressed archive", _HINT)
    for edition in _EDITIONS:
        for root in (path, path / edition.folder, path.parent):
            files = [name for names in edition.files.values() for name in names if (root / name).is_file()]
            if not files or not (root / edition.class_names).is_file():
                continue
            if root == path.parent:
                if path.name not in files:
                    continue
                return CifarSource(_index(edition, root, (path.name,), where))
            # CIFAR has no validation split; its test split is used as one.
            wanted = Split.TEST if Split.of(split) is Split.VAL else split
            hint = f"choose one, or give {root / files[-1]}"
            chosen = choose_split(root, list(edition.files), where, wanted, hint)
            return CifarSource(_index(edition, root, edition.files[chosen], where))
    folders = (path, path / "cifar-10-batches-py", path / "cifar-100-python")
    for folder in folders if path.is_dir() else (path.parent,):
        for meta, other in _PICKLES.items():
            if (folder / meta).is_file() and (folder / other).is_file():
                raise UserError(
                    where, f"{folder} is the Python version of CIFAR, whose pickle files can run code", _HINT
                )
    return None


def _index(edition: _Edition, root: Path, files: tuple[str, ...], where: str) -> Index:
    row_bytes = edition.labels + PIXEL_BYTES
    classes = (root / edition.class_names).read_text(encoding="utf-8", errors="replace").split()
    labels: list[npt.NDArray[np.uint8]] = []
    digest = FileDigest("cifar", [edition.folder, *classes])
    for name in files:
        with read_errors(where, root / name):
            data = np.fromfile(root / name, dtype=np.uint8)
            digest.add(name, (root / name).stat())
        if len(data) == 0 or len(data) % row_bytes:
            raise UserError(where, f"{root / name} does not consist of rows of {row_bytes} bytes", _HINT)
        labels.append(data.reshape(-1, row_bytes)[:, edition.labels - 1].copy())
        if labels[-1].max() >= len(classes):
            raise UserError(
                where, f"{root / name}has label {labels[-1].max()}, but there are only {len(classes)} classes", _HINT
            )
    rows = np.concatenate([np.arange(len(part)) for part in labels])
    arrays: Arrays = {
        "label": np.concatenate(labels).astype(np.int32),
        "file": np.repeat(np.arange(len(files)), [len(part) for part in labels]),
        "offset": rows * row_bytes + edition.labels,
    }
    header = {"root": str(root), "files": list(files), "classes": classes, "row_bytes": row_bytes}
    return Index({**header, **digest.header(arrays)}, arrays)
