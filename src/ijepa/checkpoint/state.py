"""The name of a checkpoint and its `state.json`.

`state.json` lists every file with its size and SHA-256, and ends with the SHA-256 of its own content. One changed bit
in a checkpoint is therefore noticed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
