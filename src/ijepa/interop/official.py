"""Checkpoints of the original code, `.pth.tar`: a pickled dictionary {encoder, target_encoder, predictor, opt, ...}.

Only tensors and plain numbers are read, nothing that could run code (`weights_only`). Names may begin with `module.`,
as DistributedDataParallel saves them. Names are otherwise the same as here, except that the original stores position
tables, which are computed here.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ijepa.interop.tensors import DTYPES, LazyTensor, Tensors
from ijepa.utils.errors import UserError

PARTS = {"encoder": "context_encoder", "target_encoder": "target_encoder", "predictor": "predictor"}
"""Names of the parts, from those of the original to ours."""
_OBJECT = re.compile(r"(?:GLOBAL|global|class)\s+`?([A-Za-z_][\w.]*)")
"""Finds the name of a forbidden object in torch's error message."""


def is_official(path: Path) -> bool:
    """Return whether torch.save wrote a file: a zip archive, or an older plain pickle."""
    with path.open("rb") as file:
        head = file.read(4)
    return head[:2] in (b"PK", b"\x80\x02") or path.name.endswith((".pth.tar", ".pth", ".pt"))


def read_official(path: Path) -> dict[str, dict[str, LazyTensor]]:
    """Return the tensors of a checkpoint by part; their values stay in the file.

    A file of one model's state (names such as `blocks.0.norm1.weight`) is read as a target encoder.

    Raises:
        UserError: The file contains code, is incomplete, or has another layout.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise UserError(path, f"contains a {type(content).__name__}, not a dictionary of models")
    parts = {ours: content[theirs] for theirs, ours in PARTS.items() if isinstance(content.get(theirs), Mapping)}
    if not parts and any("blocks.0." in str(name) for name in content):
        parts = {"target_encoder": content}
    if not {"context_encoder", "target_encoder"} & set(parts):
        keys = ", ".join(map(str, list(content)[:5]))
        raise UserError(path, f"contains no encoder, only {keys}", "is this a checkpoint of I-JEPA?")
    return {part: _tensors(path, part, state) for part, state in parts.items()}


def write_official(file: BinaryIO, parts: Mapping[str, Tensors]) -> None:
    """Write parts, by our names, as the original code reads them: float32, names with `module.`, epoch 0."""
    content: dict[str, Any] = {
        theirs: {f"module.{name}": tensor.load().detach().contiguous() for name, tensor in parts[ours].items()}
        for theirs, ours in PARTS.items()
        if ours in parts
    }
    torch.save({**content, "epoch": 0}, file)


def _load(path: Path) -> Any:
    hint = "get the file again from a source that you trust"
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_numbers()):
            warnings.simplefilter("ignore")  # torch warns of the pickle protocol before it reports the error
            # Values stay in the file until they are used; an older plain pickle cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if named := _OBJECT.search(str(error)):
            problem = f"contains code or objects ({named[1]}), not only tensors and numbers"
            raise UserError(path, problem, "if you trust it, save only the state dicts of its models") from None
        raise UserError(path, "is not a complete torch.save file", hint) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(path, f"cannot be read: {reason}", hint) from None


def _numpy_numbers() -> list[Any]:
    """Return what NumPy needs to rebuild a single number: some files hold the loss or the epoch as one."""
    kinds = [type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"]
    return [np.dtype, *kinds, np.float64(0).__reduce__()[0]]


def _tensors(path: Path, part: str, state: Mapping[Any, Any]) -> dict[str, LazyTensor]:
    found = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in DTYPES:
            problem = f"{name} of {part} is not a floating-point tensor of 16 bits or more"
            raise UserError(path, problem)
        found[str(name).removeprefix("module.")] = LazyTensor.of(value)
    return found
