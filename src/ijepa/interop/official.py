"""The original's checkpoint files, `.pth.tar`: a pickled dictionary {encoder, target_encoder, predictor, opt, ...}.

Reading admits tensors and plain numbers and nothing that could run (`weights_only`). Keys may begin with `module.`, as
DistributedDataParallel saves them. Names are ours: the mapping is the identity, but for the tables of positions, which
the original stores and we compute.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa.interop.tensors import DTYPES, Lazy, Tensors
from ijepa.utils.errors import UserError

PARTS = {"encoder": "context_encoder", "target_encoder": "target_encoder", "predictor": "predictor"}
"""What the original calls a part, and what we call it."""


def is_official(path: Path) -> bool:
    """Whether a file is one that torch.save wrote: a zip archive, or an older plain pickle."""
    with path.open("rb") as file:
        head = file.read(4)
    return head[:2] in (b"PK", b"\x80\x02") or path.name.endswith((".pth.tar", ".pth", ".pt"))


def read_official(path: Path) -> dict[str, dict[str, Lazy]]:
    """Return the parts of a checkpoint by our names, each with its tensors; their values stay in the file.

    A file that is one model's state alone (keys such as `blocks.0.norm1.weight`) counts as a target encoder.

    Raises:
        UserError: a file with code in it, cut short, or of another layout.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise UserError(path, f"holds a {type(content).__name__}, not a dictionary of models")
    parts = {ours: content[theirs] for theirs, ours in PARTS.items() if isinstance(content.get(theirs), Mapping)}
    if not parts and any("blocks.0." in str(name) for name in content):
        parts = {"target_encoder": content}
    if not {"context_encoder", "target_encoder"} & set(parts):
        keys = ", ".join(map(str, list(content)[:5]))
        raise UserError(path, f"holds no encoder, but {keys}", "is it a checkpoint of I-JEPA?")
    return {part: _tensors(path, part, state) for part, state in parts.items()}


def write_official(path: Path, parts: Mapping[str, Tensors], **more: Any) -> None:
    """Write parts, by our names, as the original's code reads them; `more` stands beside (epoch, for example)."""
    theirs = {ours: name for name, ours in PARTS.items()}
    content: dict[str, Any] = {
        theirs[part]: {f"module.{name}": tensor.make().detach().contiguous() for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    torch.save({**content, **more}, path)


def _load(path: Path) -> Any:
    hint = "fetch the file again, from where you trust it"
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numbers()):
            warnings.simplefilter("ignore")  # of a pickle's protocol, before what is wrong with it
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except RuntimeError as error:
                raise UserError(path, f"cannot be read: {_line(error)}", hint) from None
    except pickle.UnpicklingError as error:
        if named := _OBJECT.search(str(error)):
            raise UserError(
                path,
                f"holds code or objects ({named[1]}), not only tensors and numbers",
                "if you trust it, save the models' state dicts alone",
            ) from None
        raise UserError(path, "is no whole file that torch.save wrote", hint) from None
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(path, f"cannot be read: {_line(error)}", hint) from None


_OBJECT = re.compile(r"(?:GLOBAL|global|class)\s+`?([A-Za-z_][\w.]*)")
"""What torch calls something that is neither a tensor nor a number, in its refusal."""


def _numbers() -> list[Any]:
    """What NumPy rebuilds a single number by, in files that hold the loss or the epoch as one."""
    kinds = [type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"]
    return [np.dtype, *kinds, np.float64(0).__reduce__()[0]]


def _tensors(path: Path, part: str, state: Mapping[Any, Any]) -> dict[str, Lazy]:
    found = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in DTYPES:
            raise UserError(path, f"{name} of {part} is no tensor of floating-point numbers of 16 bits or more")
        found[str(name).removeprefix("module.")] = Lazy.of(value)
    return found


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
