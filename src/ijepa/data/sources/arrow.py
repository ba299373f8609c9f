"""Data sets as Hugging Face's `datasets` saves them to disk: `hf:FOLDER`, read from their Arrow files.

`save_to_disk` writes Arrow streams with the encoded images in a column, a `state.json` that names the files and a
`dataset_info.json` that says which column is what; of several splits, a folder each. The files are memory-mapped, so
that an image costs what its bytes cost, and rows keep their order.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ijepa.data.sources.base import Source, read_file
from ijepa.data.sources.index import Index, _Digest
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import read_json

PREFIX = "hf:"


class ArrowSource(Source):
    """Images in Arrow files; header `folder`, `files`, `image` (the column's name) and `classes`."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        self._columns: Any = None

    def __len__(self) -> int:
        return int(self.index.header["rows"])

    def _name(self, index: int) -> str:
        return f"{Path(self.index.header['folder']).name}/row-{index:09d}"

    def _image(self, index: int) -> bytes:
        value = self._rows()[index].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return read_file(Path(value["path"]))
        if not isinstance(data, bytes):
            raise RunError(f"{self._name(index)} holds no image")
        return data

    def _mask(self, index: int) -> bytes | None:
        return None

    def _without_mask(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self))

    def _rows(self) -> Any:
        if self._columns is None:
            header = self.index.header
            self._columns = _table(Path(header["folder"]), header["files"], "--data.path")[header["image"]]
        return self._columns


def open_saved(path: str, where: str, split: str | None) -> ArrowSource:
    """Open `hf:FOLDER`.

    Raises:
        UserError: no such folder, several splits and none chosen, no column of images, or no pyarrow.
    """
    folder = Path(path.removeprefix(PREFIX)).expanduser().absolute()
    if (folder / "dataset_dict.json").is_file():
        splits = list(read_json(folder / "dataset_dict.json").get("splits", []))
        wanted = {"val": ("validation", "val", "valid")}.get(split or "", (split,))
        chosen = next((name for name in wanted if name in splits), None)
        if chosen is None:
            raise UserError(where, f"{folder} has the splits {', '.join(splits)}", f"give {PREFIX}{folder}/{splits[0]}")
        folder = folder / chosen
    if not (folder / "state.json").is_file():
        raise UserError(where, f"{folder} holds no saved data set", "give what `Dataset.save_to_disk` wrote")
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
        except ValueError as error:  # pyarrow's errors of bad values are of this kind
            raise UserError(where, f"{folder}: its column {label} holds no labels: {error}") from None
    digest = _Digest("arrow", None)
    for name in files:
        digest.file(name, (folder / name).stat())
    header = {
        "folder": str(folder),
        "files": files,
        "image": image,
        "rows": table.num_rows,
        "classes": list(features[label].get("names", [])) if label else None,
        **digest.header(arrays),
    }
    return ArrowSource(Index(header, arrays))


def _table(folder: Path, files: list[str], where: str) -> Any:
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(where, f"{PREFIX} needs pyarrow", "pip install 'ijepa-pretrain[huggingface]'") from None
    try:
        tables = [pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all() for name in files]
        return pa.concat_tables(tables)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(where, f"{folder} cannot be read: {' '.join(str(error).split())}") from None
