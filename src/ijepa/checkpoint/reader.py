"""Reads the tensors of a checkpoint by rows.

    step-00001000/context_encoder.safetensors  target_encoder.safetensors  predictor.safetensors  optimizer.safetensors
    step-00001000/shard-00001-model-00001-of-00001.safetensors  shard-00002-...

The first form is written by one process, the second by several, in the safetensors storage of
torch.distributed.checkpoint: the header of each file names the first row of each of its tensors. A rank reads only the
rows that it will hold, from the files that have some of them, so any number of ranks reads what any other has written.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ijepa.checkpoint.state import FILES, PARTS, listed_files, read_state
from ijepa.checkpoint.verify import check_shapes, check_size


@dataclass(frozen=True)
class TensorSlice:
    """Rows of one tensor in an open file, from row `start` of the whole tensor on."""

    file: Path
    content: Any
    key: str
    start: int
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> Tensor:
        """Return those of the rows [start, stop) of the whole tensor that are here."""
        if not self.shape:
            return self.content.get_tensor(self.key)
        rows = self.content.get_slice(self.key)
        return rows[max(start - self.start, 0) : max(min(stop - self.start, self.shape[0]), 0)]


class CheckpointReader:
    """The tensors of a checkpoint, or of one part of it, by their name in the model.

    It compares sizes; `verify_file` compares checksums.

    Raises:
        UserError: a file is missing or damaged, or the format is that of another version.
    """

    def __init__(self, path: Path, part: str | None = None) -> None:
        self.path, self.state = path, read_state(path)
        self._slices: dict[str, list[TensorSlice]] = defaultdict(list)
        for name, listed in listed_files(self.state, part).items():
            # Names in a part's own file lack the part.
            prefix = name.removesuffix("safetensors") if name in FILES[:-1] else ""
            self._open(path / name, prefix, listed)
        self.shapes = {name: _whole_shape(slices) for name, slices in self._slices.items()}

    def check(self, wanted: Mapping[str, tuple[int, ...]], prefix: str = "") -> None:
        """Refuse a checkpoint whose tensors under `prefix` are not exactly those wanted, by name and shape."""
        found = {name: shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        check_shapes(self._file_of, wanted, found)

    def rows(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return rows [start, stop) of a tensor, or all of it."""
        start, stop = rows or (0, (self.shapes[name] or (1,))[0])
        slices = sorted(self._slices[name], key=lambda each: each.start)
        parts = [
            each.read(start, stop)
            for each in slices
            if not each.shape or (each.start < stop and each.start + each.shape[0] > start)
        ]
        if not parts:
            parts = [slices[0].read(0, 0)]  # no rows, but the right shape and dtype
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _file_of(self, name: str) -> Path:
        """Return the file that holds a tensor, or would hold it."""
        if name in self.shapes:
            return self._slices[name][0].file
        part = name.partition(".")[0]
        file = self.path / f"{part if part in PARTS else 'optimizer'}.safetensors"
        return file if file.exists() else self.path

    def _open(self, file: Path, prefix: str, listed: Mapping[str, Any]) -> None:
        with check_size(file, listed):
            content = safe_open(file, framework="pt")
            # torch.distributed.checkpoint writes the first row of each shard into the file's metadata.
            about = json.loads((content.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for key in content.keys():  # noqa: SIM118 - not a dict
                starts = about.get(key, {}).get("saved_offsets") or [0]
                shape = tuple(content.get_slice(key).get_shape())
                self._slices[prefix + key].append(TensorSlice(file, content, key, starts[0], shape))


def _whole_shape(slices: list[TensorSlice]) -> tuple[int, ...]:
    # Slices are cut along the first dimension; the last one ends where the tensor ends.
    shape = slices[0].shape
    return (max(each.start + each.shape[0] for each in slices), *shape[1:]) if shape else ()
