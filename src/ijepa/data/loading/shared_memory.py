"""The memory that a loader process shares with its parent, and how a batch crosses in it.

The memory is anonymous and shared by its descriptor, because containers limit /dev/shm to 64 MB. It holds the number of
the sample that the process is reading and, for each batch made ahead, its pixels and space for its small tensors. The
rest of a batch goes through a pipe as a pickle, whose tensors are in that space (pickle's "out-of-band" buffers). They
do not go through the pipe, because a process would wait there until its parent reads, instead of making the next batch.

Everything starts at a multiple of 64 bytes, and a received tensor is copied into memory that torch allocates, which is
aligned too: some CPU kernels return different bits for other alignments (`ijepa.utils.alignment`).
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

NO_SAMPLE = -1
"""The sample number before the first sample."""

_PIXELS_TO_SPACE = 4
"""The space for small tensors is a quarter of the pixels. At patches of 16, they take a sixth of the pixels' bytes."""


class SharedMemory:
    """One process's view of the memory.

    Attributes:
        pixels: (slots, B, 3, H, W) uint8, channels last in memory.
        sample: one number, the sample that is being read.
    """

    def __init__(self, descriptor: int, shape: tuple[int, ...]) -> None:
        pixel_bytes, space_bytes = _slot_sizes(shape)
        memory = mmap.mmap(descriptor, ALIGNMENT + shape[0] * (pixel_bytes + space_bytes))
        self.sample = memoryview(memory)[:8].cast("q")
        slots, images, channels, height, width = shape
        values = torch.frombuffer(memory, dtype=torch.uint8, count=slots * pixel_bytes, offset=ALIGNMENT)
        values = values.view(slots, pixel_bytes)[:, : math.prod(shape[1:])]  # without the padding of each slot
        # (slots, B * H * W * 3) -> (slots, B, H, W, 3) -> (slots, B, 3, H, W)
        self.pixels = values.unflatten(1, (images, height, width, channels)).movedim(-1, 2)
        spaces = memoryview(memory)[ALIGNMENT + slots * pixel_bytes :]
        self.spaces = [spaces[slot * space_bytes : (slot + 1) * space_bytes] for slot in range(slots)]

    def dumps(self, value: Any, slot: int) -> bytes:
        """Pickle `value`, with its tensors in the space of `slot` if they fit, else in the pickle."""
        stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
        views = [buffer.raw() for buffer in buffers]
        ends = list(accumulate(_padded(len(view)) for view in views))
        if not ends or ends[-1] > len(self.spaces[slot]):
            stream = io.BytesIO()
            _Pickler(stream, protocol=5).dump(value)
            return pickle.dumps(([], stream.getvalue()))
        for view, end in zip(views, ends, strict=True):
            begin = end - _padded(len(view))
            self.spaces[slot][begin : begin + len(view)] = view
        return pickle.dumps(([len(view) for view in views], stream.getvalue()))

    def loads(self, data: bytes, slot: int) -> Any:
        """Return what `dumps` pickled; its tensors belong to the caller."""
        lengths, stream = pickle.loads(data)
        ends = accumulate(map(_padded, lengths))
        space = self.spaces[slot]
        views = (space[end - _padded(length) :][:length] for end, length in zip(ends, lengths, strict=True))
        return pickle.loads(stream, buffers=views)


class Descriptor:
    """A file descriptor that is duplicated into the process that it is sent to at its start."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_descriptor, (DupFd(self.number),)


def _receive_descriptor(duplicate: Any) -> Descriptor:
    return Descriptor(duplicate.detach())


def anonymous_file(shape: tuple[int, ...]) -> int:
    """Return the descriptor of unnamed memory for pixels of `shape` (slots, B, 3, H, W) and the rest."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ijepa-pixels", os.MFD_CLOEXEC)
    else:  # macOS
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, ALIGNMENT + shape[0] * sum(_slot_sizes(shape)))
    return descriptor


def _slot_sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Return the bytes of a slot's pixels and of its space for small tensors."""
    pixels = math.prod(shape[1:])
    return _padded(pixels), _padded(pixels // _PIXELS_TO_SPACE)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Pickler(pickle.Pickler):
    """Pickles a tensor as a buffer, its type and its shape; torch's own way takes a descriptor and two mappings."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            array: Any = value.numpy()
            return _rebuild_tensor, (pickle.PickleBuffer(array), array.dtype.char, array.shape)
        return NotImplemented


def _rebuild_tensor(buffer: Any, kind: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(buffer, kind).reshape(shape)).clone()
