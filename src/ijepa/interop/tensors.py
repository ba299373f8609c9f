"""Weights of any size in safetensors, tensor by tensor: read as views of the file, written one after another.

`safetensors.torch.save_file` holds a second copy of everything while it writes. Here each tensor is asked for when its
turn has come and forgotten after, so that writing takes the memory of the largest one. Bytes depend on names, shapes
and values alone. Files may become several with an index, in the form that transformers reads.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa.utils.alignment import ALIGNMENT
from ijepa.utils.errors import UserError
from ijepa.utils.files import read_json

SHARD = 5 * 10**9
"""Bytes of tensors in one file for libraries that read several, at most (unless one tensor alone has more)."""

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""The types of weights that are read and written, as safetensors calls them."""


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when it is asked for."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @classmethod
    def of(cls, tensor: Tensor) -> "Lazy":
        """Wrap a tensor that is there already."""
        return cls(tuple(tensor.shape), lambda: tensor, tensor.dtype)

    def rows(self, begin: int, end: int) -> "Lazy":
        """Rows [begin, end) of this tensor."""
        return Lazy((end - begin, *self.shape[1:]), lambda: self.make()[begin:end], self.dtype)

    def single(self) -> "Lazy":
        """This tensor in float32."""
        return self if self.dtype is torch.float32 else Lazy(self.shape, lambda: self.make().float())


Tensors = Mapping[str, Lazy]


def open_tensors(path: Path) -> dict[str, Lazy]:
    """Open a safetensors file, or the shards of an index file; values are read when they are asked for.

    Raises:
        UserError: a file that is missing, cut short, or no safetensors file.
    """
    if path.name.endswith(".index.json"):
        found: dict[str, Lazy] = {}
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(path, "has no weight_map", "is it an index of safetensors files?")
        for name in sorted(set(map(str, listed.values()))):
            if Path(name).name != name:
                raise UserError(path, f"names {name}, which lies elsewhere", "an index names files beside it")
            if not name.endswith(".safetensors"):  # an index, itself even
                raise UserError(path, f"names {name}, which is no .safetensors", "is it an index of safetensors files?")
            found |= open_tensors(path.with_name(name))
        lost = sorted(set(listed) - set(found))
        if lost:
            raise UserError(path, f"{lost[0]} is in none of its files", "the set is not whole; fetch it again")
        return found
    try:
        content = safe_open(path, framework="pt")
        entries = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118
        kinds = {name: dtype for dtype, name in DTYPES.items()}
        found = {}
        for key, entry in entries.items():
            if entry.get_dtype() not in kinds:
                raise UserError(path, f"{key} is of type {entry.get_dtype()}", "weights are floating-point numbers")
            shape = tuple(entry.get_shape())
            found[key] = Lazy(shape, lambda key=key: content.get_tensor(key), kinds[entry.get_dtype()])  # type: ignore[misc]
        return found
    except FileNotFoundError:
        raise UserError(path, "does not exist", "fetch the whole folder again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(path, f"not a whole safetensors file ({error})", "fetch it again") from None


def metadata(file: Path) -> dict[str, str]:
    """Return what a safetensors file says of itself beside its tensors.

    Raises:
        UserError: a file that is no whole safetensors file.
    """
    try:
        return safe_open(file, framework="pt").metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(file, f"not a whole safetensors file ({error})", "fetch it again") from None


def write_tensors(
    folder: Path, stem: str, tensors: Tensors, *, shard: int | None = None, about: Mapping[str, str] | None = None
) -> list[str]:
    """Write `stem`.safetensors into `folder`, or its shards and their index; return the names of the files.

    Args:
        folder, stem: where to, and the name's beginning.
        tensors: what is written.
        shard: bytes of tensors above which a file ends and the next begins; None: one file.
        about: metadata of every file.
    """
    groups: list[dict[str, Lazy]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and shard is not None and filled + tensor.size > shard:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.size
    if len(groups) == 1:
        _write(folder / f"{stem}.safetensors", groups[0], about or {})
        return [f"{stem}.safetensors"]
    names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for file, group in zip(names, groups, strict=True):
        _write(folder / file, group, about or {})
    index = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors.values())},
        "weight_map": {name: file for file, group in zip(names, groups, strict=True) for name in sorted(group)},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [*names, f"{stem}.safetensors.index.json"]


def _write(file: Path, tensors: Tensors, about: Mapping[str, str]) -> None:
    """Write one file: eight bytes of length, a JSON header, the tensors' bytes.

    The header is padded so that the tensors start at a multiple of 64 bytes: mapped from the file, they are aligned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.size
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-(8 + len(words)) % ALIGNMENT)
    with file.open("wb") as out:
        out.write(len(words).to_bytes(8, "little") + words)
        for tensor in tensors.values():
            value = tensor.make().detach().to("cpu", tensor.dtype).contiguous()
            out.write(value.flatten().view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())
