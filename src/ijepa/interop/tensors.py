"""Safetensors files of any size, read and written one tensor at a time.

`safetensors.torch.save_file` copies all tensors in memory while it writes. Here each tensor is loaded when it is
written and dropped afterwards, so that an export needs the memory of the largest tensor. The bytes of a file depend
only on names, shapes and values. A model may be split into several files with an index, as transformers reads it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa.utils.alignment import ALIGNMENT
from ijepa.utils.errors import UserError
from ijepa.utils.files import atomic_file, read_json, write_json

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""Types of weights that are read and written, by their names in safetensors."""
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is loaded when it is needed.

    Attributes:
        shape: Its shape.
        load: Returns the tensor.
        dtype: Its type.
    """

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """Wrap a tensor that is in memory."""
        return cls(tuple(tensor.shape), lambda: tensor, tensor.dtype)

    def rows(self, begin: int, end: int) -> "LazyTensor":
        """Return rows [begin, end) of this tensor."""
        return LazyTensor((end - begin, *self.shape[1:]), lambda: self.load()[begin:end], self.dtype)

    def float32(self) -> "LazyTensor":
        """Return this tensor in float32."""
        return self if self.dtype is torch.float32 else LazyTensor(self.shape, lambda: self.load().float())


Tensors = Mapping[str, LazyTensor]


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Open a safetensors file, or the files that an index lists; values are read when they are needed.

    Raises:
        UserError: A file is missing, incomplete or not in safetensors format.
    """
    if path.name.endswith(".index.json"):
        return _open_index(path)
    content = _open(path)
    found = {}
    for key in content.keys():  # noqa: SIM118 - not a dict
        entry = content.get_slice(key)
        dtype = _BY_NAME.get(entry.get_dtype())
        if dtype is None:
            raise UserError(path, f"{key} has type {entry.get_dtype()}", "weights must be floating-point numbers")
        found[key] = LazyTensor(tuple(entry.get_shape()), lambda key=key: content.get_tensor(key), dtype)  # type: ignore[misc]
    return found


def _open_index(path: Path) -> dict[str, LazyTensor]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict):
        raise UserError(path, "has no weight_map", "is this an index of safetensors files?")
    found: dict[str, LazyTensor] = {}
    for name in sorted(set(map(str, listed.values()))):
        # An index that listed itself, or a file elsewhere, would read what the user did not name.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(path, f"lists {name}", "an index may list only .safetensors files in its own folder")
        found |= open_tensors(path.with_name(name))
    if missing := sorted(set(listed) - set(found)):
        raise UserError(path, f"{missing[0]} is not in any of its files", "download all files again")
    return found


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        UserError: The file is missing, incomplete or not in safetensors format.
    """
    return _open(path).metadata() or {}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(path, "does not exist", "download the whole folder again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(path, f"is not a complete safetensors file ({error})", "download it again") from None


def write_tensors(
    folder: Path, stem: str, tensors: Tensors, *, shard: int | None = None, about: Mapping[str, str] | None = None
) -> list[str]:
    """Write `stem`.safetensors into `folder`, or several files and their index, and return the names of the files.

    Args:
        folder: The folder.
        stem: First part of the names.
        tensors: The tensors.
        shard: Maximum bytes of tensors per file (a larger tensor has its own file); None: one file.
        about: Metadata of every file.
    """
    # A file ends where the next tensor would not fit, so that the split depends only on names, order and shapes.
    groups: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and shard is not None and filled + tensor.nbytes > shard:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    names = [f"{stem}.safetensors"]
    if len(groups) > 1:
        names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        with atomic_file(folder / name) as file:
            write_safetensors(file, group, about or {})
    if len(groups) == 1:
        return names
    index = f"{stem}.safetensors.index.json"
    places = {key: name for name, group in zip(names, groups, strict=True) for key in sorted(group)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": places})
    return [*names, index]


def write_safetensors(file: BinaryIO, tensors: Tensors, about: Mapping[str, str]) -> None:
    """Write tensors in safetensors format: eight bytes of length, a JSON header, the bytes of the tensors.

    The header is padded so that tensors start at a multiple of 64 bytes and are aligned when the file is mapped.
    """
    # Shapes are known before values: the header comes first, and then one tensor at a time.
    header: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        value = tensor.load().detach().to("cpu", tensor.dtype).contiguous()
        file.write(value.flatten().view(torch.uint8).numpy().data)
