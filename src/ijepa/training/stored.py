"""The tensors of a checkpoint, read by rows, whoever wrote it: one process, or several of which each wrote its part.

    step-00001000/context_encoder.safetensors  target_encoder.safetensors  predictor.safetensors  optimizer.safetensors
    step-00001000/shard-00001-model-00001-of-00001.safetensors  shard-00002-...

The second form is that of torch.distributed.checkpoint's safetensors storage: every file says in its header at which
row each of its tensors begins. `state.json` lists the files, so that a missing one is noticed. A rank reads only the
rows that it will hold, from as many files as have some of them, so any number of ranks reads what any other wrote.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa.errors import Refused
from ijepa.files import read_json

PARTS = ("context_encoder", "target_encoder", "predictor")
FORMAT = 1


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor in one open file, beginning at row `start`."""

    file: Path
    content: Any
    key: str
    start: int
    shape: tuple[int, ...]

    def read(self, begin: int, end: int) -> Tensor:
        """Return the piece's rows that lie in [begin, end) of the whole tensor."""
        part = self.content.get_slice(self.key)
        if not self.shape:
            return self.content.get_tensor(self.key)
        return part[max(begin - self.start, 0) : max(min(end - self.start, self.shape[0]), 0)]


class Stored:
    """A checkpoint's tensors by their name in the model.

    Raises:
        Refused: when a file is missing or damaged, or the format is another version's.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, read_json(path / "state.json")
        if self.state.get("format") != FORMAT:
            raise Refused(
                path / "state.json", f"format {self.state.get('format')}", f"this version reads format {FORMAT}"
            )
        if type(self.state.get("step")) is not int:
            raise Refused(path / "state.json", "step is missing", "use an earlier checkpoint")
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        shards = self.state.get("shards")
        files = shards if shards is not None else {f"{part}.safetensors": None for part in (*PARTS, "optimizer")}
        for name, size in files.items():
            prefix = "" if shards is not None or name.startswith("optimizer") else name.removesuffix("safetensors")
            self._open(path / name, prefix, size)
        self.shapes = {name: _whole(pieces) for name, pieces in self._pieces.items()}

    def check(self, wanted: dict[str, tuple[int, ...]], prefix: str = "") -> None:
        """Refuse a checkpoint whose tensors under `prefix` are not exactly those wanted, by name and shape."""
        there = {name for name in self.shapes if name.startswith(prefix)}
        for name in sorted({*wanted, *there}):
            file = self._pieces[name][0].file if name in self.shapes else self._file_of(name)
            if name not in there:
                raise Refused(file, f"{name} is missing", "the file belongs to another model")
            if name not in wanted:
                raise Refused(file, f"{name} is unknown", "the file belongs to another model")
            if self.shapes[name] != wanted[name]:
                raise Refused(
                    file,
                    f"{name} has shape {self.shapes[name]}, the recipe's model {wanted[name]}",
                    "use the recipe the file was trained with",
                )

    def rows(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return rows [start, stop) of a tensor, or all of it."""
        begin, end = rows or (0, (self.shapes[name] or (1,))[0])
        pieces = sorted(self._pieces[name], key=lambda piece: piece.start)
        parts = [p.read(begin, end) for p in pieces if not p.shape or (p.start < end and p.start + p.shape[0] > begin)]
        if not parts:
            parts = [pieces[0].read(0, 0)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _file_of(self, name: str) -> Path:
        """The file in which a tensor that is not there would be."""
        part = name.partition(".")[0]
        file = self.path / f"{part if part in PARTS else 'optimizer'}.safetensors"
        return file if file.exists() else self.path

    def _open(self, file: Path, prefix: str, size: int | None) -> None:
        try:
            if size is not None and file.stat().st_size != size:
                raise Refused(file, f"has {file.stat().st_size} bytes, not {size}", "use an earlier checkpoint")
            content = safe_open(file, framework="pt")
            about = json.loads((content.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for key in content.keys():  # noqa: SIM118 - not a dict
                starts = about.get(key, {}).get("saved_offsets") or [0]
                shape = tuple(content.get_slice(key).get_shape())
                self._pieces[prefix + key].append(Piece(file, content, key, starts[0], shape))
        except FileNotFoundError:
            raise Refused(file, "does not exist", "the checkpoint is not whole; use an earlier one") from None
        except (SafetensorError, OSError) as error:
            raise Refused(file, f"not a whole safetensors file ({error})", "use an earlier checkpoint") from None


def _whole(pieces: list[Piece]) -> tuple[int, ...]:
    shape = pieces[0].shape
    return (max(piece.start + piece.shape[0] for piece in pieces), *shape[1:]) if shape else ()
