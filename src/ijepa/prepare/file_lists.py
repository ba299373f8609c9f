"""Lists of images: a CSV or a parquet file with paths, absolute or relative to the list's folder, and optional labels.

Columns are found by name: path (or filename, file, image) and label (or class). A CSV without such a first line has the
columns path and label.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ijepa.data.sources.index import FileDigest, Index, text_arrays
from ijepa.data.sources.parquet import open_file
from ijepa.utils.errors import UserError

_PATHS, _LABELS = ("path", "filename", "file", "image"), ("label", "class")
_Row = tuple[str, str, str | None]
"""Place in the list, for messages; path; label, None in a list without labels."""


def list_index(file: Path) -> Index:
    """Return the index of the images that a file lists.

    Raises:
        UserError: a bad row, or an image that does not exist.
    """
    root = file.absolute().parent
    names, labels = list[str](), list[str]()
    digest = FileDigest("list", None)
    try:
        for place, name, label in _parquet(file) if file.suffix == ".parquet" else _csv(file):
            if not name or label == "":
                raise UserError(file, f"{place} has no {'label' if name else 'path'}", "write path,label")
            try:
                digest.add(f"{name}\0{label}", (root / name).stat())
            except (OSError, ValueError):
                raise UserError(file, f"{place} names {str(root / name)[:200]}, which does not exist") from None
            names.append(name)
            labels += [] if label is None else [label]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(file, f"cannot be read: {error}") from None
    if not names:
        raise UserError(file, "lists no images", "write one path,label per line")
    arrays = text_arrays("names", names)
    # Numbers are sorted as numbers, words by alphabet.
    numbers = all(label.isdecimal() for label in labels)
    classes = sorted(set(labels), key=(lambda label: (int(label), label)) if numbers else None)
    if classes:
        place_of = {name: index for index, name in enumerate(classes)}
        arrays["label"] = np.array([place_of[label] for label in labels], dtype=np.int32)
    header = {"root": str(root), "masks": str(root), "classes": classes or None, **digest.header(arrays)}
    return Index(header, arrays)


def _csv(file: Path) -> Iterator[_Row]:
    path, label, width = 0, 1, 2
    with file.open(newline="", encoding="utf-8-sig") as lines:  # spreadsheets write a byte order mark
        rows = csv.reader(lines)
        try:
            for number, row in enumerate(rows, 1):
                cells = [cell.strip() for cell in row]
                if number == 1 and _column(cells, _PATHS) >= 0:
                    path, label, width = _column(cells, _PATHS), _column(cells, _LABELS), len(cells)
                elif row and len(row) != width:
                    problem = f"line {rows.line_num} is {','.join(row)[:60]!r}"
                    raise UserError(file, problem, "write path,label" if width == 2 else f"write {width} columns")
                elif row:
                    yield f"line {rows.line_num}", cells[path], cells[label] if label >= 0 else None
        except csv.Error as error:
            raise UserError(file, f"line {rows.line_num} is not valid CSV: {error}") from None


def _parquet(file: Path) -> Iterator[_Row]:
    opened = open_file(file, str(file))
    columns = opened.schema_arrow.names
    path, label = _column(columns, _PATHS), _column(columns, _LABELS)
    if path < 0:
        raise UserError(
            file,
            f"has no column of paths; its columns are {', '.join(columns)[:200]}",
            f"rename one of them to {_PATHS[0]}",
        )
    wanted = [columns[place] for place in (path, label) if place >= 0]
    row = 0
    for batch in _batches(opened, file, wanted):
        paths = batch.column(wanted[0]).to_pylist()
        labels = batch.column(wanted[-1]).to_pylist() if label >= 0 else [None] * len(paths)
        for name, value in zip(paths, labels, strict=True):
            row += 1
            if name is not None and not isinstance(name, str):
                hint = "if it contains the images themselves, use `ijepa data pack folder`"
                raise UserError(file, f"its column {wanted[0]} does not contain paths", hint)
            yield f"row {row}", (name or "").strip(), None if label < 0 else "" if value is None else str(value).strip()


def _batches(opened: Any, file: Path, columns: list[str]) -> Iterator[Any]:
    """Yield the batches of rows of a parquet file; a damaged page is a UserError."""
    import pyarrow as pa

    try:
        yield from opened.iter_batches(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(file, f"cannot be read: {' '.join(str(error).split())[:200]}") from None


def _column(names: list[str], wanted: tuple[str, ...]) -> int:
    """Return the number of the first column with one of the wanted names, -1 without one."""
    lower = [name.strip().lower() for name in names]
    return next((lower.index(name) for name in wanted if name in lower), -1)
