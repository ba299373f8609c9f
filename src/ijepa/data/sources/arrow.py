"""Data sets saved by Hugging Face's `datasets`: `hf:FOLDER`, read from their Arrow files.

`save_to_disk` writes Arrow streams with the encoded images in a column, a `state.json` that names the files and a
`dataset_info.json` with the type of each column; if there are several splits, one folder each. The files are
memory-mapped, so that reading an image costs only its own bytes.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from ijepa.data.sources.base import Source, read_file
from ijepa.data.sources.index import FileDigest, Index
from ijepa.data.split import Split
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.extras import require_extra
from ijepa.utils.files import read_json

PREFIX = "hf:"


class ArrowSource(Source):
    """Images in Arrow files; header `folder`, `files`, `image` (the name of the column) and `classes`."""

    def __len__(self) -> int:
        return int(self.index.header["rows"])

    def _name(self, index: int) -> str:
        return f"{Path(self.index.header['folder']).name}/row-{index:09d}"

    def _image(self, index: int) -> bytes:
        data = image_bytes(self._images[index].as_py(), Path())
        if data is None:
            raise RunError(f"{self._name(index)} contains no image")
        return data

    @cached_property
    def _images(self) -> Any:
        header = self.index.header
        return _table(Path(header["folder"]), header["files"], "--data.path")[header["image"]]


def image_bytes(value: Any, root: Path) -> bytes | None:
    """Return the image in a cell: its bytes, or {bytes, path} with a path relative to `root`; None without an image."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        return read_file(root / value["path"])
    return data if isinstance(data, bytes) else None


def open_saved(path: str, where: str, split: str | None) -> ArrowSource:
    """Open `hf:FOLDER`.

    Raises:
        UserError: there is no such data set, several splits and none chosen, no column of images, or no pyarrow.
    """
    folder = Path(path.removeprefix(PREFIX)).expanduser().absolute()
    if (folder / "dataset_dict.json").is_file():
        folder = folder / _choose(folder, where, split)
    if not (folder / "state.json").is_file():
        raise UserError(where, f"{folder} is not a saved data set", "give a folder that `Dataset.save_to_disk` wrote")
    files = [entry["filename"] for entry in read_json(folder / "state.json").get("_data_files", [])]
    features = read_json(folder / "dataset_info.json").get("features") or {}
    image = next((name for name, kind in features.items() if kind.get("_type") == "Image"), None)
    label = next((name for name, kind in features.items() if kind.get("_type") == "ClassLabel"), None)
    if image is None:
        raise UserError(where, f"{folder} has no column of images", f"its columns are {', '.join(features)}")
    table = _table(folder, files, where)
    arrays = {}
    if label is not None:
        try:
            arrays["label"] = table[label].cast("int32").fill_null(-1).to_numpy()
        except ValueError as error:  # pyarrow's errors for bad values are subclasses
            raise UserError(where, f"{folder}: column {label} does not contain labels: {error}") from None
    digest = FileDigest("arrow", None)
    for name in files:
        digest.add(name, (folder / name).stat())
    header = {
        "folder": str(folder),
        "files": files,
        "image": image,
        "rows": table.num_rows,
        "classes": list(features[label].get("names", [])) if label else None,
        **digest.header(arrays),
    }
    return ArrowSource(Index(header, arrays))


def _choose(folder: Path, where: str, split: str | None) -> str:
    """Return the name of the split to read. It may be any name, such as `train_small`, and not only an alias."""
    names = list(read_json(folder / "dataset_dict.json").get("splits", []))
    known = Split.of(split)
    wanted = (split, *(known.aliases if known else ()))
    chosen = next((name for name in wanted if name in names), None)
    if chosen is None:
        raise UserError(where, f"{folder} has the splits {', '.join(names)}", f"give {PREFIX}{folder}/{names[0]}")
    return str(chosen)


def _table(folder: Path, files: list[str], where: str) -> Any:
    require_extra("pyarrow", "huggingface", where)
    import pyarrow as pa

    try:
        tables = [pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all() for name in files]
        return pa.concat_tables(tables)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(where, f"{folder} cannot be read: {' '.join(str(error).split())}") from None
