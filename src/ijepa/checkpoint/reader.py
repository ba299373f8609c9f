"""Reads a checkpoint: its state, its checksums, and its tensors by rows.

    step-00001000/context_encoder.safetensors  target_encoder.safetensors  predictor.safetensors  optimizer.safetensors
    step-00001000/shard-00001-model-00001-of-00001.safetensors  shard-00002-...

The first form is written by one process, the second by several, in the safetensors storage of
torch.distributed.checkpoint: the header of each file names the first row of each of its tensors. A rank reads only the
rows that it will hold, from the files that have some of them, so any number of ranks reads what any other has written.

`state.json` lists every file with its size and SHA-256, and ends with the SHA-256 of its own content. One changed bit
in a checkpoint is therefore noticed.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json, sha256_of

PARTS = ("context_encoder", "target_encoder", "predictor")
FILES = tuple(f"{part}.safetensors" for part in (*PARTS, "optimizer"))
FORMAT = 2

EARLIER = "use an earlier checkpoint; `ijepa pretrain --resume last-good` does so"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint's name, None if the name is not that of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    step = int(match.group(1)) if match else None
    # `step-000000007` has nine digits, but the name of step 7 has eight.
    return step if step is not None and checkpoint_name(step) == path.name else None


def seal(state: Mapping[str, Any]) -> str:
    """Return the text of `state.json`: the state, and the SHA-256 of it as the last value."""
    digest = hashlib.sha256(json.dumps(state, allow_nan=False).encode()).hexdigest()
    return json.dumps({**state, "sha256": digest}, indent=1, allow_nan=False) + "\n"


def read_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`.

    Raises:
        UserError: it is missing, damaged, of another format, or of another step than the folder's name says.
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
    if state.get("format") != FORMAT:
        raise UserError(file, f"has format {state.get('format')}", f"this version reads format {FORMAT}; {EARLIER}")
    if not _is_sealed(state, file):
        raise UserError(file, "is damaged: its content does not match its checksum", EARLIER)
    if type(state.get("step")) is not int:
        raise UserError(file, "the key step is missing", EARLIER)
    if step_of(folder) not in (None, state["step"]):
        raise UserError(file, f"has step {state['step']}, but the folder's name has a different step", EARLIER)
    return state


def _is_sealed(state: dict[str, Any], file: Path) -> bool:
    """Whether a file equals, byte for byte, what `seal` returns for its content."""
    # Comparing the text, and not the values, notices flipped bits in spaces and line ends as well.
    content = {key: value for key, value in state.items() if key != "sha256"}
    try:
        return seal(content).encode() == file.read_bytes()
    except ValueError:  # NaN, which `seal` never writes
        return False


def describe(file: Path) -> dict[str, Any]:
    """Return a file's entry in `state.json`."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def listed_files(state: Mapping[str, Any], part: str | None = None) -> dict[str, dict[str, Any]]:
    """Return the entries of a checkpoint's files, or of those that hold a part of the model."""
    files, own = state["files"], f"{part}.safetensors"
    return {own: files[own]} if own in files else files


def verify_file(folder: Path, state: Mapping[str, Any], name: str) -> None:
    """Compare a file of a checkpoint with its entry.

    Raises:
        UserError: it is missing, unreadable, or has other bytes.
    """
    file, listed = folder / name, state["files"][name]
    with _checked(file, listed):
        if sha256_of(file) != listed["sha256"]:
            raise UserError(file, "is damaged: its content does not match its checksum in state.json", EARLIER)


@contextmanager
def _checked(file: Path, listed: Mapping[str, Any]) -> Iterator[None]:
    """Compare the size of a file with its entry in `state.json`, and turn errors of reading it into a UserError."""
    try:
        if (size := file.stat().st_size) != listed["bytes"]:
            raise UserError(file, f"has {size} bytes, not {listed['bytes']}", EARLIER)
        yield
    except FileNotFoundError:
        raise UserError(file, "does not exist", f"the checkpoint is incomplete; {EARLIER}") from None
    except SafetensorError as error:
        raise UserError(file, f"is not a complete safetensors file ({error})", EARLIER) from None
    except OSError as error:
        raise UserError(file, f"cannot be read: {error.strerror}", EARLIER) from None


def verify_checkpoint(path: Path, settings: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Compare a checkpoint with its checksums and with the run, and return its state. Every rank calls it.

    The ranks share the files, and each hashes its files in threads. A core computes SHA-256 at 1.9 GB/s (measured on
    an AMD EPYC, Zen 5, with SHA instructions). ViT-H's checkpoint has 10.4 GB: 0.7 s on eight ranks, or 2.7 s on one
    process with enough cores, because its largest file has half of the bytes. A slower disk sets the time.

    Args:
        path: the checkpoint's folder.
        settings: what determines the run's result, by key; keys that the checkpoint lacks are not compared.
        world: the ranks.

    Raises:
        UserError: on every rank, the first file that is missing or damaged, or a checkpoint of another run.
    """
    state = world.run_on_rank0(lambda: read_state(path))
    saved = state.get("recipe", {})
    for key in sorted(settings.keys() & saved.keys()):
        if saved[key] != settings[key]:
            raise UserError(path / "state.json", f"has {key} = {saved[key]}, not {settings[key]}", EARLIER)
    world.map_items(sorted(state["files"]), lambda name: verify_file(path, state, name))
    return state


def verify_part(folder: Path, part: str, verified: set[str]) -> None:
    """Compare the files that hold a part of the model with their checksums, if the folder is a checkpoint.

    Files in `verified` are skipped; the others are added to it.

    Raises:
        UserError: the first file that is missing or damaged.
    """
    if not (folder / "state.json").exists():
        return
    state = read_state(folder)
    new = sorted(listed_files(state, part).keys() - verified)
    SINGLE_PROCESS.map_items(new, lambda name: verify_file(folder, state, name))
    verified.update(new)


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
        with _checked(file, listed):
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


def check_shapes(
    file_of: Callable[[str], Path], wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that are not exactly those wanted.

    Args:
        file_of: returns the file that holds a tensor, or would hold it, for the message.
        wanted: shapes by name.
        found: shapes by name.

    Raises:
        UserError: the first tensor that is missing, unknown, or of another shape.
    """
    for name in sorted({*wanted, *found}):
        if name not in found or name not in wanted:
            state = "missing" if name in wanted else "unknown"
            raise UserError(file_of(name), f"{name} is {state}", "the file belongs to a different model")
        if found[name] != wanted[name]:
            raise UserError(
                file_of(name),
                f"{name} has shape {found[name]}, but the recipe needs {wanted[name]}",
                "use the recipe that the file was trained with",
            )
