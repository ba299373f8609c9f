"""The tensors of a checkpoint, read by rows, whether one process wrote it or several wrote a part each.

    step-00001000/context_encoder.safetensors  target_encoder.safetensors  predictor.safetensors  optimizer.safetensors
    step-00001000/shard-00001-model-00001-of-00001.safetensors  shard-00002-...

The second form is that of torch.distributed.checkpoint's safetensors storage: every file says in its header at which
row each of its tensors begins. A rank reads only the rows that it will hold, from as many files as have some of them,
so any number of ranks reads what any other wrote.

`state.json` lists every file with its size and SHA-256, and ends with the SHA-256 of its own content. One changed bit
in a checkpoint therefore shows. Format 1 had no checksums; it is read without them.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json, sha256_of

PARTS = ("context_encoder", "target_encoder", "predictor")
FILES = tuple(f"{part}.safetensors" for part in (*PARTS, "optimizer"))
FORMAT = 2
WITHOUT_CHECKSUMS = 1
"""The earlier format: no checksums, sizes only of sharded files."""

EARLIER = "use an earlier checkpoint, in pretraining by --resume last-good"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step that a checkpoint's name states; None where the name is not one of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    step = int(match.group(1)) if match else None
    return step if step is not None and checkpoint_name(step) == path.name else None


def seal(state: Mapping[str, Any]) -> str:
    """Return the text of `state.json`: the state and, as its last value, the SHA-256 of it."""
    digest = hashlib.sha256(json.dumps(state, allow_nan=False).encode()).hexdigest()
    return json.dumps({**state, "sha256": digest}, indent=1, allow_nan=False) + "\n"


def read_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`.

    Raises:
        UserError: it is missing, damaged, of a later format, or of another step than the folder's name says.
    """
    file = folder / "state.json"
    if step_of(folder) is not None and not folder.is_dir():
        raise UserError(folder, "is not a folder", EARLIER)
    if not file.is_file():
        raise UserError(file, "does not exist", EARLIER)
    try:
        state = read_json(file)
    except UserError as error:
        raise UserError(file, error.problem, EARLIER) from None
    if state.get("format") not in (FORMAT, WITHOUT_CHECKSUMS):
        raise UserError(file, f"format {state.get('format')}", f"this version reads format {FORMAT}; {EARLIER}")
    if state["format"] == FORMAT and not _is_sealed(state, file):
        raise UserError(file, "is damaged: its content does not match its checksum", EARLIER)
    if type(state.get("step")) is not int:
        raise UserError(file, "step is missing", EARLIER)
    if step_of(folder) not in (None, state["step"]):
        raise UserError(file, f"is of step {state['step']}, not of the folder's", EARLIER)
    return state


def _is_sealed(state: dict[str, Any], file: Path) -> bool:
    """Whether a file is, byte for byte, what `seal` made of its content."""
    content = {key: value for key, value in state.items() if key != "sha256"}
    try:
        return seal(content).encode() == file.read_bytes()
    except ValueError:  # NaN, which `seal` does not write
        return False


def describe(file: Path) -> dict[str, Any]:
    """Return what `state.json` lists of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def listed_files(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint's state says of each of its files; of format 1, at most the size."""
    if state["format"] == FORMAT:
        return dict(state["files"])
    shards = state.get("shards")
    if shards is None:
        return {name: {} for name in FILES}
    return {name: {"bytes": size} for name, size in shards.items()}


def verify_file(folder: Path, state: Mapping[str, Any], name: str) -> None:
    """Compare a file of a checkpoint with what its state lists.

    Raises:
        UserError: it is missing, unreadable, or has other bytes.
    """
    file, listed = folder / name, listed_files(state).get(name, {})
    try:
        size = file.stat().st_size
        if size != listed.get("bytes", size):
            raise UserError(file, f"has {size} bytes, not {listed['bytes']}", EARLIER)
        if "sha256" in listed and sha256_of(file) != listed["sha256"]:
            raise UserError(file, "is damaged: its content does not match its checksum in state.json", EARLIER)
    except FileNotFoundError:
        raise UserError(file, "does not exist", f"the checkpoint is not whole; {EARLIER}") from None
    except OSError as error:
        raise UserError(file, f"cannot be read: {error.strerror}", EARLIER) from None


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
    """A checkpoint's tensors by their name in the model. Sizes are compared here, checksums by `verify_file`.

    Raises:
        UserError: when a file is missing or damaged, or the format is another version's.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, read_state(path)
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for name, listed in listed_files(self.state).items():
            prefix = name.removesuffix("safetensors") if name in FILES[:-1] else ""
            self._open(path / name, prefix, listed.get("bytes"))
        self.shapes = {name: _whole(pieces) for name, pieces in self._pieces.items()}

    def check(self, wanted: dict[str, tuple[int, ...]], prefix: str = "") -> None:
        """Refuse a checkpoint whose tensors under `prefix` are not exactly those wanted, by name and shape."""
        there = {name for name in self.shapes if name.startswith(prefix)}
        for name in sorted({*wanted, *there}):
            file = self._pieces[name][0].file if name in self.shapes else self._file_of(name)
            if name not in there:
                raise UserError(file, f"{name} is missing", "the file belongs to another model")
            if name not in wanted:
                raise UserError(file, f"{name} is unknown", "the file belongs to another model")
            if self.shapes[name] != wanted[name]:
                raise UserError(
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
                raise UserError(file, f"has {file.stat().st_size} bytes, not {size}", EARLIER)
            content = safe_open(file, framework="pt")
            about = json.loads((content.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for key in content.keys():  # noqa: SIM118 - not a dict
                starts = about.get(key, {}).get("saved_offsets") or [0]
                shape = tuple(content.get_slice(key).get_shape())
                self._pieces[prefix + key].append(Piece(file, content, key, starts[0], shape))
        except FileNotFoundError:
            raise UserError(file, "does not exist", f"the checkpoint is not whole; {EARLIER}") from None
        except (SafetensorError, OSError) as error:
            raise UserError(file, f"not a whole safetensors file ({error})", EARLIER) from None


def _whole(pieces: list[Piece]) -> tuple[int, ...]:
    shape = pieces[0].shape
    return (max(piece.start + piece.shape[0] for piece in pieces), *shape[1:]) if shape else ()
