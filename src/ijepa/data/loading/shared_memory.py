"""The memory that a loader process and its parent have in common, and how a batch crosses in it.

It is anonymous and shared by its descriptor, not in /dev/shm, which containers keep to 64 MB. For each batch made ahead
there are its pixels and some room for its small tensors; one number says which sample the process is at. What a batch
holds besides goes through a pipe as a pickle, whose tensors stand in that room (pickle's own "out-of-band" buffers) and
cost one copy on either side. As torch's shared tensors each would cost a descriptor and two mappings.

Everything starts at a multiple of 64 bytes, and a tensor that arrives is copied into memory that torch allocates, which
does too: some of a CPU's kernels give other bits for other alignments (`ijepa.utils.alignment`).
"""

import io
import math
import mmap
import os
import pickle
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa.utils.alignment import ALIGNMENT

NAMELESS = -1
"""What stands for the sample before the first."""

_SHARE = 4
"""Pixels have so many times the bytes of the room for small tensors, which take a sixth of them at patches of 16."""


class SharedMemory:
    """One process's view of it.

    Attributes:
        pixels: (slots, B, 3, H, W) uint8, channels last in memory.
        mark: one number, the sample that is being read.
    """

    def __init__(self, descriptor: int, shape: tuple[int, ...]) -> None:
        pixels, room = _sizes(shape)
        memory = mmap.mmap(descriptor, ALIGNMENT + shape[0] * (pixels + room))
        self.mark = memoryview(memory)[:8].cast("q")
        slots, images, channels, height, width = shape
        values = torch.frombuffer(memory, dtype=torch.uint8, count=slots * pixels, offset=ALIGNMENT)
        values = values.view(slots, pixels)[:, : math.prod(shape[1:])]
        self.pixels = values.unflatten(1, (images, height, width, channels)).movedim(-1, 2)
        rooms = memoryview(memory)[ALIGNMENT + slots * pixels :]
        self.rooms = [rooms[slot * room : (slot + 1) * room] for slot in range(slots)]

    def dumps(self, value: Any, slot: int) -> bytes:
        """Pickle `value`, its tensors in the room of `slot` if they fit, else in the pickle."""
        stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
        views = [buffer.raw() for buffer in buffers]
        ends = list(accumulate(map(_padded, map(len, views))))
        if not ends or ends[-1] > len(self.rooms[slot]):
            stream = io.BytesIO()
            _Pickler(stream, protocol=5).dump(value)
            return pickle.dumps(([], stream.getvalue()))
        for view, end in zip(views, ends, strict=True):
            begin = end - _padded(len(view))
            self.rooms[slot][begin : begin + len(view)] = view
        return pickle.dumps(([len(view) for view in views], stream.getvalue()))

    def loads(self, data: bytes, slot: int) -> Any:
        """Return what was pickled with `dumps`; its tensors are the caller's."""
        lengths, stream = pickle.loads(data)
        ends = list(accumulate(map(_padded, lengths)))
        room = self.rooms[slot]
        views = (room[end - _padded(length) :][:length] for end, length in zip(ends, lengths, strict=True))
        return pickle.loads(stream, buffers=views)


class Descriptor:
    """A file descriptor that is duplicated into the process it is sent to at its start."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.number),)


def anonymous_file(shape: tuple[int, ...]) -> int:
    """Return the descriptor of memory without a name, for pixels of `shape` (slots, B, 3, H, W) and the rest."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ijepa-pixels", os.MFD_CLOEXEC)
    else:  # not Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, ALIGNMENT + shape[0] * sum(_sizes(shape)))
    return descriptor


def _sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Bytes of a slot's pixels and of its room."""
    pixels = math.prod(shape[1:])
    return _padded(pixels), _padded(pixels // _SHARE)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _received(duplicate: Any) -> Descriptor:
    return Descriptor(duplicate.detach())


class _Pickler(pickle.Pickler):
    """Writes a tensor as a buffer and how to read it."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            array: Any = value.numpy()
            return _tensor, (pickle.PickleBuffer(array), array.dtype.char, array.shape)
        return NotImplemented


def _tensor(buffer: Any, kind: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(buffer, kind).reshape(shape)).clone()
