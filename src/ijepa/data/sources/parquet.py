"""Parquet files that contain the images, as data sets are published: `train-00000-of-00257.parquet`, ...

The image is a column of bytes, or of {bytes, path} as Hugging Face's `datasets` writes them. The label is a column of
numbers or words. The index stores the number of rows of each row group, and the labels. Parquet can only read a whole
row group at once, so each process keeps the last row groups, up to 256 MB. Reading large row groups in random order is
slow; `ijepa data pack` makes shards of them.
"""

import json
import os
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ijepa.data.paths import expand_braces, parquet_files, select_split
from ijepa.data.sources.arrow import image_bytes
from ijepa.data.sources.base import Source
from ijepa.data.sources.index import Arrays, FileDigest, Index, cached_index, require_regular
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.extras import require_extra

_CACHE_BYTES, _MAX_OPEN_FILES = 2**28, 16
_MAX_GROUP_BYTES = 2**30
"""Row groups with more bytes of images are refused."""


class ParquetSource(Source):
    """Images in parquet files.

    Header `root`, `files` and `image` (the name of the column); arrays of the row groups: `ends` (g,) int64, the number
    of rows up to the end of each, `file` and `group` (g,) int32, the file and the number of the group in it.
    """

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        self._open = lru_cache(_MAX_OPEN_FILES)(_open_for_reading)
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self.index.arrays["ends"][-1])

    def _name(self, index: int) -> str:
        group, _ = self._place(index)
        first_group = group - int(self.index.arrays["group"][group])  # of the same file
        return f"{self._path(group).name}/row-{index - self._start(first_group):07d}"

    def _image(self, index: int) -> bytes:
        group, row = self._place(index)
        value = self._column(group)[row].as_py()
        return image_bytes(value, self._path(group).parent) or b""  # empty bytes are an image that cannot be decoded

    def _place(self, index: int) -> tuple[int, int]:
        """Return the row group of a sample, and its row in the group."""
        group = int(np.searchsorted(self.index.arrays["ends"], index, side="right"))
        return group, index - self._start(group)

    def _start(self, group: int) -> int:
        return int(self.index.arrays["ends"][group - 1]) if group else 0

    def _path(self, group: int) -> Path:
        return Path(self.index.header["root"], self.index.header["files"][int(self.index.arrays["file"][group])])

    def _column(self, group: int) -> Any:
        """Return a row group's images, from memory if it was used recently."""
        column = self._groups.pop(group, None)
        if column is None:
            column = self._read(group)
        self._groups[group] = column
        # At least one group is kept, because the next samples of an unshuffled read are in the same group.
        while len(self._groups) > 1 and sum(each.nbytes for each in self._groups.values()) > _CACHE_BYTES:
            self._groups.popitem(last=False)
        return column

    def _read(self, group: int) -> Any:
        import pyarrow as pa

        path, number = self._path(group), int(self.index.arrays["group"][group])
        columns = [self.index.header["image"]]
        try:
            column = self._open(path).read_row_group(number, columns=columns, use_threads=False).column(0)
        except (OSError, pa.ArrowException, IndexError) as error:
            raise RunError(f"{path}: row group {number} cannot be read: {' '.join(str(error).split())}") from error
        if len(column) != int(self.index.arrays["ends"][group]) - self._start(group):
            raise RunError(f"{path} has changed since it was indexed: row group {number} has {len(column)} rows")
        return column


def _open_for_reading(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)  # not memory-mapped, because an I/O error in mapped memory kills the process


def find_parquet(path: str | Path, where: str, split: str | None) -> list[Path] | None:
    """Return the parquet files that a path means: one file, a pattern, a folder, or the folder `data` in it.

    Raises:
        UserError: a pattern that matches nothing, or several splits and none chosen.
    """
    given = Path(path).expanduser().absolute()
    if given.suffix == ".parquet" and not given.is_dir():
        names = expand_braces(str(given.relative_to(given.anchor)))
        found = sorted(file for name in names for file in Path(given.anchor).glob(name))
        if len(found) < len(names):
            raise UserError(
                where, f"{path} does not exist" if len(names) == 1 else f"some files of {path} do not exist"
            )
        return found
    for folder in (given, given / "data"):
        files = parquet_files(folder)
        if files:
            return [folder / name for name in select_split(folder, files, where, split, "*.parquet")]
    return None


def open_parquet(paths: list[Path], where: str) -> ParquetSource:
    """Open the images in parquet files, in the order of the files.

    Raises:
        UserError: no pyarrow, a file that is damaged or has no column of images, or row groups that are too large.
    """
    root = Path(os.path.commonpath([path.parent for path in paths]))
    digest = FileDigest("parquet", None)
    for path in paths:
        stat = path.stat()
        require_regular(path, stat, where)
        digest.add(str(path.relative_to(root)), stat)
    open_file(paths[0], where)  # reports a missing pyarrow here, even if the index is cached

    def make() -> Index:
        image, label, classes = _find_columns(open_file(paths[0], where), paths[0], where)
        rows, places, labels = list[int](), list[tuple[int, int]](), list[Any]()
        for number, path in enumerate(paths):
            file = open_file(path, where)
            missing = {image, *filter(None, [label])} - set(file.schema_arrow.names)
            if missing:
                raise UserError(where, f"{path} has no column {missing.pop()}, which {paths[0].name} has")
            for group in range(file.num_row_groups):
                rows.append(_count_rows(file, group, image, path, where))
                places.append((number, group))
            if label is not None:
                labels += _read_labels(file, label, path, where)
        if not sum(rows):
            raise UserError(where, f"{paths[0]} has no rows")
        table = np.array(places, dtype=np.int32)
        arrays: Arrays = {"ends": np.cumsum(rows, dtype=np.int64)}
        arrays["file"], arrays["group"] = table.T.copy()
        if any(isinstance(each, str) for each in labels):  # words become numbers in alphabetical order
            classes = sorted({each for each in labels if each is not None})
            number_of = {name: number for number, name in enumerate(classes)}
            labels = [number_of.get(each) for each in labels]
        if label is not None:
            arrays["label"] = np.array([-1 if each is None else each for each in labels], dtype=np.int32)
        files = [str(path.relative_to(root)) for path in paths]
        header = {"root": str(root), "files": files, "image": image, "classes": classes, **digest.header(arrays)}
        return Index(header, arrays)

    return ParquetSource(cached_index(root, digest.stamp(), make))


def open_file(path: Path, where: str) -> Any:
    """Open one parquet file.

    Raises:
        UserError: no pyarrow, or not a parquet file.
    """
    require_extra("pyarrow", "huggingface", where)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(where, f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _count_rows(file: Any, group: int, image: str, path: Path, where: str) -> int:
    about = file.metadata.row_group(group)
    columns = map(about.column, range(about.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] == image)
    if size > _MAX_GROUP_BYTES:
        problem = f"{path} has {size / 1e9:.1f} GB of images in row group {group}, which is too much to read at once"
        raise UserError(where, problem, "write it with row_group_size=100")
    return int(about.num_rows)


def _read_labels(file: Any, label: str, path: Path, where: str) -> list[Any]:
    """Return the labels in a file, None for rows without one."""
    import pyarrow as pa

    try:
        return list(file.read([label]).column(0).to_pylist())
    except (OSError, pa.ArrowException) as error:
        problem = f"{path}: column {label} cannot be read: {' '.join(str(error).split())}"
        raise UserError(where, problem, "download it again") from None


def _find_columns(file: Any, path: Path, where: str) -> tuple[str, str | None, list[str] | None]:
    """Return the columns of image and label, and class names, by Hugging Face's metadata or else by the types."""
    import pyarrow as pa

    schema = file.schema_arrow
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):  # no such metadata, or in an unknown form
        features = {}
    kinds = {name: kind.get("_type") for name, kind in features.items() if isinstance(kind, dict)}

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
    classes = features[label].get("names") if label is not None and kinds.get(label) == "ClassLabel" else None
    return images[0], label, classes or None
