"""Processes that make batches ahead of time and return them in order.

Item i is made by worker i modulo the number of workers, and answers are read in that order. So the processes need no
queue, no locks and no threads: each has one pipe to the parent. When either end dies, the other notices at once,
because the pipe ends. A worker whose pipe ends leaves, so no worker outlives its parent, even after SIGKILL. A parent
whose pipe ends reports which worker died and why. Pixels and small tensors are written to memory that both share
(`shared_memory`).

A worker that dies, or that takes longer than the timeout for a batch, is replaced once per micro-batch. The new worker
makes the missing batches again, which are the same, because a batch is a function of its number. The second time ends
the run with a line that names the sample, whose number the worker writes to the shared memory.

Workers start from a fork server that has imported torch and runs nothing: they start in milliseconds and inherit no
thread or lock of the parent. They ignore SIGINT and SIGTERM, because the parent decides when to stop.

torch's DataLoader is not used, because it cannot replace a worker. After a worker's death its iterator only raises;
with workers of spawn or fork, a signal handler raises in whatever the main thread is doing, such as an optimizer step.
It also takes more CPU time: with 280 ImageNet files, masks of ViT-H/16 and two workers, 3.3 ms per image against 2.5 ms
in micro-batches of 32, and 3.5 ms against 3.1 ms in micro-batches of 128 (interleaved runs on an Intel Xeon, family 6
model 207, whose other processes were busy). Each of its tensors is new shared memory, in /dev/shm, with a mapping.
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

from ijepa.data.loading.shared_memory import NO_SAMPLE, Descriptor, SharedMemory, anonymous_file
from ijepa.masking.batch import Batch
from ijepa.utils.errors import RunError

Make = Callable[[int, Tensor], Batch]
"""(item, pixels to write into) -> batch."""

_EXIT_SECONDS = 5.0
"""Time for a worker to leave after its pipe is closed; it may be in the middle of a micro-batch."""


class LoaderDefect(RuntimeError):
    """An unexpected exception in a worker; `str()` contains its traceback."""


class _WorkerLost(Exception):
    """A worker died or hangs; `str()` says which and why."""


def prefetch_batches(
    make: Make,
    items: Sequence[int],
    *,
    shape: tuple[int, ...],
    workers: int,
    prefetch: int,
    pin: bool = False,
    timeout: float | None = None,
    sample_name: Callable[[int], str] = str,
    on_restart: Callable[[str], None] = lambda line: None,
) -> Iterator[Batch]:
    """Yield make(item, pixels) for each item, in order.

    Args:
        make: makes a batch; called in a worker.
        items: numbers of the batches.
        shape: shape of the pixels (uint8) that `make` receives.
        workers: number of processes.
        prefetch: number of batches that each worker makes ahead.
        pin: copy the pixels to pinned memory.
        timeout: seconds that a worker has for a batch; no limit if None.
        sample_name: returns the name of a sample that `make` passed to `report_sample`.
        on_restart: called with a line when a worker was replaced.

    Raises:
        RunError: raised by `make`, or two workers died or hung at the same item.
        LoaderDefect: `make` raised another exception.
    """
    team: list[Worker] = []
    replaced: set[int] = set()
    close = partial(_close, team)
    # Before multiprocessing's own exit handler, which would wait for workers that wait for this process.
    atexit.register(close)
    try:
        for _ in range(min(workers, len(items))):
            team.append(Worker(make, shape, prefetch))
        for place, item in enumerate(items[: len(team) * prefetch]):
            team[place % len(team)].ask(item, place // len(team) % prefetch)
        for place, item in enumerate(items):
            # Worker w makes the items at places w, w + W, ...; its n-th item uses slot n modulo `prefetch`.
            ahead = place + len(team) * prefetch
            slot = place // len(team) % prefetch
            while True:
                worker = team[place % len(team)]
                try:
                    batch = worker.answer(item, slot, pin, timeout)
                    break
                except _WorkerLost as lost:
                    line = f"{lost} while making micro-batch {item}{worker.where(sample_name)}"
                    if item in replaced:
                        raise RunError(f"{line}, for the second time") from None
                    replaced.add(item)
                    on_restart(f"{line}; a new process replaces it")
                    worker.end()
                    worker = team[place % len(team)] = Worker(make, shape, prefetch)
                    for missing in range(place, min(ahead, len(items)), len(team)):
                        worker.ask(items[missing], missing // len(team) % prefetch)
            if ahead < len(items):  # the slot is free, because `answer` has copied the pixels
                worker.ask(items[ahead], slot)
            yield batch
    finally:
        close()
        atexit.unregister(close)


def _close(team: list["Worker"]) -> None:
    for worker in team:
        worker.pipe.close()
    for worker in team:
        worker.process.join(_EXIT_SECONDS)
        worker.end()
    team.clear()


class Worker:
    """The parent's side of one process: ask for items, then take the answers in the same order."""

    def __init__(self, make: Make, shape: tuple[int, ...], slots: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ijepa.data.loading.loader", "ijepa.masking.packing"])
        descriptor = anonymous_file((slots, *shape))
        self.memory = SharedMemory(descriptor, (slots, *shape))
        self.memory.sample[0] = NO_SAMPLE
        self.pipe, other = context.Pipe()
        arguments = (other, Descriptor(descriptor), (slots, *shape), make)
        self.process = context.Process(target=_serve, args=arguments, name="ijepa-loader", daemon=True)
        self.process.start()
        # The pipe must have one owner per end, or the end of a process would not close it.
        other.close()
        os.close(descriptor)

    def ask(self, item: int, slot: int) -> None:
        """Request an item, with its pixels in `slot` of the shared memory."""
        with suppress(OSError):  # the process is dead; `answer` will report it with the number of the micro-batch
            self.pipe.send((item, slot))

    def answer(self, item: int, slot: int, pin: bool, timeout: float | None) -> Batch:
        """Return the batch of an item, with its pixels copied out of `slot`; see `prefetch_batches`."""
        try:
            if not self.pipe.poll(timeout):
                raise _WorkerLost(f"loader process {self.process.pid} has not answered for {timeout:g} seconds")
            answer = self.memory.loads(self.pipe.recv_bytes(), slot)
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, Exception):
            raise answer
        if pin:
            answer = answer.pin_memory()
        made = self.memory.pixels[slot]
        pixels = torch.empty(made.shape, dtype=torch.uint8, memory_format=torch.channels_last, pin_memory=pin)
        batch: Batch = replace(answer, pixels=pixels.copy_(made))
        return batch

    def where(self, sample_name: Callable[[int], str]) -> str:
        """Return the sample that the worker was reading as `, at NAME`, or "" if it has not reported any."""
        number = self.memory.sample[0]
        return "" if number == NO_SAMPLE else f", at {sample_name(number)}"

    def end(self) -> None:
        """End the process. One that the system cannot kill, because it hangs in a read, is left behind."""
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join(_EXIT_SECONDS)

    def _death(self) -> _WorkerLost:
        self.process.join(_EXIT_SECONDS)
        code = self.process.exitcode
        cause = f"exit code {code}"
        if code is not None and code < 0:
            cause = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                cause += ", possibly because memory ran out"
        return _WorkerLost(f"loader process {self.process.pid} died ({cause})")


_sample = memoryview(bytearray(8)).cast("q")
"""In a worker: the number in shared memory of the sample that it is reading."""


def report_sample(number: int) -> None:
    """Record which sample is being read, so that the parent can name it if this process dies or hangs."""
    _sample[0] = number


def _serve(pipe: Connection, handle: Descriptor, shape: tuple[int, ...], make: Make) -> None:
    """Make items until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    global _sample
    torch.set_num_threads(1)  # there is a process for each core
    memory = SharedMemory(handle.number, shape)
    _sample = memory.sample
    while True:
        try:
            item, slot = pipe.recv()
            pipe.send_bytes(memory.dumps(_make_answer(make, item, memory.pixels[slot]), slot))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the parent closed the pipe or died


def _make_answer(make: Make, item: int, pixels: Tensor) -> Batch | Exception:
    try:
        batch = make(item, pixels)
    except RunError as error:
        return RunError(str(error))  # without its cause, which may not be picklable
    except Exception:
        return LoaderDefect(f"in a loader process, making micro-batch {item}:\n{traceback.format_exc()}")
    if batch.pixels.data_ptr() != pixels.data_ptr():
        pixels.copy_(batch.pixels)
    return replace(batch, pixels=torch.empty(0, dtype=torch.uint8))  # the pixels are in shared memory already
