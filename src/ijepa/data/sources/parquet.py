"""Parquet files that hold the images themselves, as data sets are published: `train-00000-of-00257.parquet`, ...

The image is a column of bytes, or of {bytes, path} as Hugging Face's `datasets` writes them; the label is a column of
numbers or words. What lies where is kept in an index: the rows of each row group, and the labels. A row group is what
parquet can read at once, so an image costs its whole group: the groups used last are kept, up to 256 MB a process.
Reading in a random order is therefore slow where groups are large; `ijepa data pack` makes shards of them.
"""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.data import paths as listing
from ijepa.data.sources.base import Source, read_file
from ijepa.data.sources.index import Arrays, Index, _cached, _Digest, require_regular
from ijepa.utils.errors import RunError, UserError

_KEPT_BYTES, _KEPT_FILES = 2**28, 16
_LARGEST = 2**30
"""Bytes of a row group's images above which it is not read."""


class ParquetSource(Source):
    """Images in parquet files.

    Header `root`, `files` and `image` (the column's name); arrays `ends` (g,) int64, the rows up to and with each row
    group, `file` and `group` (g,) int32, where it lies.
    """

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self.index.arrays["ends"][-1])

    def _name(self, index: int) -> str:
        group, _ = self._place(index)
        before = group - int(self.index.arrays["group"][group])  # the file's first group
        return f"{self._path(group).name}/row-{index - self._start(before):07d}"

    def _image(self, index: int) -> bytes:
        group, row = self._place(index)
        value = self._column(group)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return read_file(self._path(group).parent / value["path"])
        return data or b""  # which decodes as little as what is no image

    def _mask(self, index: int) -> bytes | None:
        return None

    def _without_mask(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self))

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.index.arrays["ends"], index, side="right"))
        return group, index - self._start(group)

    def _start(self, group: int) -> int:
        return int(self.index.arrays["ends"][group - 1]) if group else 0

    def _path(self, group: int) -> Path:
        return Path(self.index.header["root"], self.index.header["files"][int(self.index.arrays["file"][group])])

    def _column(self, group: int) -> Any:
        """Return a row group's images; those used last are at hand."""
        column = self._groups.pop(group, None)
        if column is None:
            column = self._read(group)
        self._groups[group] = column
        while len(self._groups) > 1 and sum(each.nbytes for each in self._groups.values()) > _KEPT_BYTES:
            self._groups.popitem(last=False)
        return column

    def _read(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays, path = self.index.arrays, self._path(group)
        file, number = int(arrays["file"][group]), int(arrays["group"][group])
        opened = self._open.pop(file, None)
        try:
            if opened is None:
                opened = pq.ParquetFile(path)  # read, not mapped: a disk's errors stay errors
            column = opened.read_row_group(number, columns=[self.index.header["image"]], use_threads=False).column(0)
        except (OSError, pa.ArrowException, IndexError) as error:
            raise RunError(f"{path}: row group {number} cannot be read: {' '.join(str(error).split())}") from error
        self._open[file] = opened
        if len(self._open) > _KEPT_FILES:
            self._open.popitem(last=False)
        if len(column) != int(arrays["ends"][group]) - self._start(group):
            raise RunError(f"{path} has changed since it was indexed: row group {number} has {len(column)} rows")
        return column


def find(path: str | Path, where: str, split: str | None) -> list[Path] | None:
    """Return the parquet files that a path means: one, a pattern's, or those of a folder or of `data/` in it.

    Raises:
        UserError: a pattern that matches nothing, or several splits and none chosen.
    """
    given = Path(path).expanduser().absolute()
    if given.suffix == ".parquet" and not given.is_dir():
        names = listing.expand_braces(str(given.relative_to(given.anchor)))
        found = sorted(file for name in names for file in Path(given.anchor).glob(name))
        if len(found) < len(names):
            raise UserError(where, f"{path} does not exist" if len(names) == 1 else f"not all of {path} exists")
        return found
    for folder in (given, given / "data"):
        files = listing.parquet_files(folder)
        if files:
            return [folder / name for name in listing.choose(folder, files, where, split, "*.parquet")]
    return None


def open_parquet(paths: list[Path], where: str) -> ParquetSource:
    """Open the images in parquet files, in the files' order.

    Raises:
        UserError: no pyarrow, a file that is damaged or has no column of images, or row groups too large to be read.
    """
    root = Path(os.path.commonpath([path.parent for path in paths]))
    digest = _Digest("parquet", None)
    for path in paths:
        stat = path.stat()
        require_regular(path, stat, where)
        digest.file(str(path.relative_to(root)), stat)
    open_file(paths[0], where)  # whatever the index's age: without pyarrow, this is where it is said

    def make() -> Index:
        rows, places, labels = list[int](), list[tuple[int, int]](), list[Any]()
        first = open_file(paths[0], where)
        image, label, classes = _columns(first, paths[0], where)
        for number, path in enumerate(paths):
            opened = open_file(path, where)
            missing = {image, *filter(None, [label])} - set(opened.schema_arrow.names)
            if missing:
                raise UserError(where, f"{path} has no column {missing.pop()}, which {paths[0].name} has")
            for group in range(opened.num_row_groups):
                about = opened.metadata.row_group(group)
                columns = map(about.column, range(about.num_columns))
                size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == image)
                if size > _LARGEST:
                    problem = (
                        f"{path} has {size / 1e9:.1f} GB of images in row group {group}, too much to be read at once"
                    )
                    raise UserError(where, problem, "write it with row_group_size=100")
                rows.append(about.num_rows)
                places.append((number, group))
            if label is not None:
                labels += _read_labels(opened, label, path, where)
        if not sum(rows):
            raise UserError(where, f"{paths[0]} holds no rows")
        table = np.array(places, dtype=np.int32)
        arrays: Arrays = {"ends": np.cumsum(rows, dtype=np.int64)}
        arrays["file"], arrays["group"] = table.T.copy()
        if any(isinstance(each, str) for each in labels):
            classes = sorted({each for each in labels if each is not None})
            numbers = {name: place for place, name in enumerate(classes)}
            labels = [numbers.get(each) for each in labels]
        if label is not None:
            arrays["label"] = np.array([-1 if each is None else each for each in labels], dtype=np.int32)
        files = [str(path.relative_to(root)) for path in paths]
        header = {"root": str(root), "files": files, "image": image, "classes": classes, **digest.header(arrays)}
        return Index(header, arrays)

    return ParquetSource(_cached(root, digest.stamp(), make))


def open_file(path: Path, where: str) -> Any:
    """Open one parquet file.

    Raises:
        UserError: no pyarrow, or no parquet file.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(where, f"{path} needs pyarrow", "pip install 'ijepa-pretrain[huggingface]'") from None
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(where, f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _read_labels(file: Any, label: str, path: Path, where: str) -> list[Any]:
    """Return a file's labels, None where a row has none.

    Raises:
        UserError: they cannot be read.
    """
    import pyarrow as pa

    try:
        return list(file.read([label]).column(0).to_pylist())
    except (OSError, pa.ArrowException) as error:
        problem = f"{path}: its column {label} cannot be read: {' '.join(str(error).split())}"
        raise UserError(where, problem, "fetch it again") from None


def _columns(file: Any, path: Path, where: str) -> tuple[str, str | None, list[str] | None]:
    """Return the image's column, the label's and the classes' names, as the file says or its types show."""
    import pyarrow as pa

    schema = file.schema_arrow
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):  # none, or nothing that we know: its types say enough
        told = {}
    kinds = {name: kind.get("_type") for name, kind in told.items() if isinstance(kind, dict)}

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    images = [name for name in schema.names if kinds.get(name) == "Image"]
    images += [name for name in schema.names if holds_images(schema.field(name).type)]
    if not images:
        raise UserError(where, f"{path} has no column of images", f"its columns are {', '.join(schema.names)[:200]}")
    labels = [name for name in schema.names if kinds.get(name) == "ClassLabel"]
    for name in ("label", "cls", "class"):
        if name in schema.names:
            kind = schema.field(name).type
            labels += [name] if pa.types.is_integer(kind) or pa.types.is_string(kind) else []
    label = labels[0] if labels else None
    names = told[label].get("names") if label is not None and kinds.get(label) == "ClassLabel" else None
    return images[0], label, names or None
