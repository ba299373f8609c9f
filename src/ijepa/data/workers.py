"""Processes that make batches ahead of their use, and hand them over in order.

Item i goes to worker i modulo their number, and answers are taken in that order, so the processes need no queue, no
locks and no threads: each has one pipe to the parent. That pipe is also how either end learns of the other's death,
at once and whatever the cause: a worker whose pipe ends leaves, so none outlives its parent, not even after SIGKILL;
a parent whose pipe ends says which worker died, and of what. torch's DataLoader polls for both, and loses its workers
when a scheduler signals the process group.

Pixels are written by the worker where the parent reads them, in anonymous memory shared by its descriptor and not in
/dev/shm, which containers keep to 64 MB. The small tensors of a batch travel in the pipe as plain bytes: as torch's
shared tensors each would cost a descriptor and two mappings.

Workers start from a fork server that has imported torch and nothing has run in it: they start in milliseconds, and no
thread or lock of the parent is copied into them. They ignore SIGINT and SIGTERM: when to stop is the parent's decision.
"""

import atexit
import io
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor

from ijepa.batch import Batch
from ijepa.errors import Failed

Make = Callable[[int, Tensor], Batch]
"""(item, pixels to write into) -> batch."""

_PATIENCE = 5.0
"""Seconds a worker has to leave when its pipe is closed; it may be in the middle of a micro-batch."""


def produce(
    make: Make, items: Sequence[int], *, shape: tuple[int, ...], workers: int, prefetch: int, pin: bool = False
) -> Iterator[Batch]:
    """Yield make(item, pixels) for every item, in order, made by `workers` processes up to `prefetch` ahead each.

    `shape` is that of the pixels (uint8) each batch is made with; those of the batch are a copy, in pinned memory
    with `pin`.

    Raises:
        Failed: what `make` raised as such, or that a worker died.
    """
    team: list[_Worker] = []
    close = partial(_close, team)
    atexit.register(close)  # runs before multiprocessing's own, which would wait for workers that wait for us
    try:
        for _ in range(min(workers, len(items))):
            team.append(_Worker(make, shape, prefetch))
        for place, item in enumerate(items[: len(team) * prefetch]):
            team[place % len(team)].ask(item, place // len(team) % prefetch)
        for place, item in enumerate(items):
            worker, slot = team[place % len(team)], place // len(team) % prefetch
            batch = worker.answer(item, slot, pin)
            ahead = place + len(team) * prefetch
            if ahead < len(items):
                worker.ask(items[ahead], slot)
            yield batch
    finally:
        close()
        atexit.unregister(close)


def _close(team: list["_Worker"]) -> None:
    for worker in team:
        worker.pipe.close()
    for worker in team:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
    team.clear()


class _Worker:
    """The parent's side of one process: ask for items, then take the answers in the same order."""

    def __init__(self, make: Make, shape: tuple[int, ...], slots: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ijepa.data.loader", "ijepa.packing"])
        descriptor = _anonymous_file(slots * math.prod(shape))
        self.pixels = _map(descriptor, (slots, *shape))
        self.pipe, other = context.Pipe()
        arguments = (other, _Descriptor(descriptor), (slots, *shape), make)
        self.process = context.Process(target=_serve, args=arguments, name="ijepa-loader", daemon=True)
        self.process.start()
        other.close()
        os.close(descriptor)

    def ask(self, item: int, slot: int) -> None:
        with suppress(OSError):  # it died: the answer it still owes says so, and names the micro-batch
            self.pipe.send((item, slot))

    def answer(self, item: int, slot: int, pin: bool) -> Batch:
        try:
            answer = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._died(item) from error
        if isinstance(answer, Exception):
            raise answer
        if pin:
            answer = answer.pin_memory()
        pixels = torch.empty(self.pixels.shape[1:], dtype=torch.uint8, pin_memory=pin)
        batch: Batch = replace(answer, pixels=pixels.copy_(self.pixels[slot]))
        return batch

    def _died(self, item: int) -> Failed:
        self.process.join(_PATIENCE)
        code = self.process.exitcode
        cause = f"exit code {code}"
        if code is not None and code < 0:
            cause = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                cause += ", as the system sends when memory runs out"
        return Failed(f"loader process {self.process.pid} died ({cause}) before it had made micro-batch {item}")


def _serve(pipe: Connection, handle: "_Descriptor", shape: tuple[int, ...], make: Make) -> None:
    """Make items until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    pixels = _map(handle.number, shape)
    while True:
        try:
            item, slot = pipe.recv()
            pipe.send_bytes(_dumps(_answer(make, item, pixels[slot])))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the parent closed the pipe, or is no more


def _answer(make: Make, item: int, pixels: Tensor) -> Batch | Exception:
    try:
        batch = make(item, pixels)
    except Failed as error:
        return Failed(str(error))
    except Exception:
        return RuntimeError(f"in a loader process, making micro-batch {item}:\n{traceback.format_exc()}")
    if batch.pixels.data_ptr() != pixels.data_ptr():
        pixels.copy_(batch.pixels)
    return replace(batch, pixels=torch.empty(0, dtype=torch.uint8))


class _Descriptor:
    """A file descriptor that is duplicated into the process it is sent to at its start."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.number),)


def _received(duplicate: Any) -> _Descriptor:
    return _Descriptor(duplicate.detach())


def _anonymous_file(size: int) -> int:
    """Return the descriptor of `size` bytes of memory without a name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ijepa-pixels", os.MFD_CLOEXEC)
    else:  # not Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _map(descriptor: int, shape: tuple[int, ...]) -> Tensor:
    memory = mmap.mmap(descriptor, math.prod(shape))
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


class _Pickler(pickle.Pickler):
    """Writes tensors as numpy arrays, in the stream: small ones cost three microseconds so."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(value)
    return stream.getvalue()
