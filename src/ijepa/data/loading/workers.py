"""Processes that make batches ahead of their use, and hand them over in order.

Item i goes to worker i modulo their number, and answers are taken in that order, so the processes need no queue, no
locks and no threads: each has one pipe to the parent. That pipe is also how either end learns of the other's death,
at once and whatever the cause: a worker whose pipe ends leaves, so none outlives its parent, not even after SIGKILL;
a parent whose pipe ends says which worker died, and of what. torch's DataLoader polls for both, and loses its workers
when a scheduler signals the process group.

Pixels are written by the worker where the parent reads them, in memory that both share (`shared`), and so are a batch's
small tensors.

A worker that dies, or makes nothing for longer than it has patience for, is replaced once for each micro-batch: the new
one makes again what the old one owed, which is the same because a batch is a function of its number. A second time ends
the run, in a line that names the sample it was at; where that lies is one number in the shared memory.

Workers start from a fork server that has imported torch and nothing has run in it: they start in milliseconds, and no
thread or lock of the parent is copied into them. They ignore SIGINT and SIGTERM: when to stop is the parent's decision.
"""

import atexit
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from ijepa.data.loading.shared_memory import NAMELESS, Descriptor, SharedMemory, anonymous_file
from ijepa.masking.batch import Batch
from ijepa.utils.errors import RunError

Make = Callable[[int, Tensor], Batch]
"""(item, pixels to write into) -> batch."""

_PATIENCE = 5.0
"""Seconds a worker has to leave when its pipe is closed; it may be in the middle of a micro-batch."""


def produce(
    make: Make,
    items: Sequence[int],
    *,
    shape: tuple[int, ...],
    workers: int,
    prefetch: int,
    pin: bool = False,
    timeout: float | None = None,
    name: Callable[[int], str] = str,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Batch]:
    """Yield make(item, pixels) for every item, in order, made by `workers` processes up to `prefetch` ahead each.

    `shape` is that of the pixels (uint8) each batch is made with; those of the batch are a copy, in pinned memory
    with `pin`. A worker has `timeout` seconds for a batch, for ever if None; `name` says which sample a number is that
    `make` gave to `mark`, and `tell` is told of a worker that was replaced.

    Raises:
        RunError: what `make` raised as such, or that two workers died or hung at the same item.
        LoaderDefect: anything else that `make` raised.
    """
    team: list[Worker] = []
    replaced: set[int] = set()
    close = partial(_close, team)
    atexit.register(close)  # runs before multiprocessing's own, which would wait for workers that wait for us
    try:
        for _ in range(min(workers, len(items))):
            team.append(Worker(make, shape, prefetch))
        for place, item in enumerate(items[: len(team) * prefetch]):
            team[place % len(team)].ask(item, place // len(team) % prefetch)
        for place, item in enumerate(items):
            ahead = place + len(team) * prefetch
            slot = place // len(team) % prefetch
            while True:
                worker = team[place % len(team)]
                try:
                    batch = worker.answer(item, slot, pin, timeout)
                    break
                except _Lost as lost:
                    line = f"{lost} making micro-batch {item}{worker.at(name)}"
                    if item in replaced:
                        raise RunError(f"{line}, for the second time") from None
                    replaced.add(item)
                    tell(f"{line}; a new one goes on")
                    worker.end()
                    worker = team[place % len(team)] = Worker(make, shape, prefetch)
                    for owed in range(place, min(ahead, len(items)), len(team)):
                        worker.ask(items[owed], owed // len(team) % prefetch)
            if ahead < len(items):
                worker.ask(items[ahead], slot)
            yield batch
    finally:
        close()
        atexit.unregister(close)


def _close(team: list["Worker"]) -> None:
    for worker in team:
        worker.pipe.close()
    for worker in team:
        worker.process.join(_PATIENCE)
        worker.end()
    team.clear()


class LoaderDefect(RuntimeError):
    """What went wrong in a worker without being `RunError`; `str()` holds its traceback."""


class _Lost(Exception):
    """A worker died or hangs; `str()` says which and of what."""


class Worker:
    """The parent's side of one process: ask for items, then take the answers in the same order."""

    def __init__(self, make: Make, shape: tuple[int, ...], slots: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ijepa.data.loading.loader", "ijepa.masking.packing"])
        descriptor = anonymous_file((slots, *shape))
        self.memory = SharedMemory(descriptor, (slots, *shape))
        self.memory.mark[0] = NAMELESS
        self.pipe, other = context.Pipe()
        arguments = (other, Descriptor(descriptor), (slots, *shape), make)
        self.process = context.Process(target=_serve, args=arguments, name="ijepa-loader", daemon=True)
        self.process.start()
        other.close()
        os.close(descriptor)

    def ask(self, item: int, slot: int) -> None:
        """Have an item made, its pixels in `slot` of the shared memory."""
        with suppress(OSError):  # it died: the answer it still owes says so, and names the micro-batch
            self.pipe.send((item, slot))

    def answer(self, item: int, slot: int, pin: bool, timeout: float | None) -> Batch:
        """Return what was made of an item, its pixels copied out of `slot`; see `produce`."""
        try:
            if not self.pipe.poll(timeout):
                raise _Lost(f"loader process {self.process.pid} has hung for {timeout:g} seconds,")
            answer = self.memory.loads(self.pipe.recv_bytes(), slot)
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(answer, Exception):
            raise answer
        if pin:
            answer = answer.pin_memory()
        made = self.memory.pixels[slot]
        pixels = torch.empty(made.shape, dtype=torch.uint8, memory_format=torch.channels_last, pin_memory=pin)
        batch: Batch = replace(answer, pixels=pixels.copy_(made))
        return batch

    def at(self, name: Callable[[int], str]) -> str:
        """Say which sample the worker was at, where it said so."""
        number = self.memory.mark[0]
        return "" if number == NAMELESS else f", at {name(number)}"

    def end(self) -> None:
        """Make sure that the process is gone; one that the system cannot kill, in a hung read, is left behind."""
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join(_PATIENCE)

    def _died(self) -> _Lost:
        self.process.join(_PATIENCE)
        code = self.process.exitcode
        cause = f"exit code {code}"
        if code is not None and code < 0:
            cause = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                cause += ", as the system sends when memory runs out"
        return _Lost(f"loader process {self.process.pid} died ({cause})")


_mark = memoryview(bytearray(8)).cast("q")
"""In a worker: the shared number that says which sample it is at."""


def mark(number: int) -> None:
    """Say which sample is being read, for whoever has to explain why this process is no more."""
    _mark[0] = number


def _serve(pipe: Connection, handle: Descriptor, shape: tuple[int, ...], make: Make) -> None:
    """Make items until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    global _mark
    torch.set_num_threads(1)
    memory = SharedMemory(handle.number, shape)
    _mark = memory.mark
    while True:
        try:
            item, slot = pipe.recv()
            pipe.send_bytes(memory.dumps(_answer(make, item, memory.pixels[slot]), slot))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the parent closed the pipe, or is no more


def _answer(make: Make, item: int, pixels: Tensor) -> Batch | Exception:
    try:
        batch = make(item, pixels)
    except RunError as error:
        return RunError(str(error))
    except Exception:
        return LoaderDefect(f"in a loader process, making micro-batch {item}:\n{traceback.format_exc()}")
    if batch.pixels.data_ptr() != pixels.data_ptr():
        pixels.copy_(batch.pixels)
    return replace(batch, pixels=torch.empty(0, dtype=torch.uint8))
