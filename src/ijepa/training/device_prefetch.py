"""What keeps the device from waiting for the host: inputs that travel while the last step computes, and garbage
collection at moments of our choice.

A copy of a batch in the device's main stream waits for the step before it; in a stream of its own it runs beside that
step, and the next one waits for the copy alone. A collection over all objects takes tens of milliseconds and comes on
any rank at any moment, while all others wait in the next collective; so it comes on all ranks after the same step.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ijepa.masking.batch import Batch

COLLECT_EVERY = 500
"""Steps between garbage collections."""


class DevicePrefetcher:
    """Brings batches to a device. Where that is the host's own memory, it hands them on as they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return `batch` on the device; what is queued after this call finds it there."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
        main = torch.cuda.current_stream(self._device)
        main.wait_stream(self._stream)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(main)  # else its memory could be given to the next copy while the step still reads
            return tensor

        return moved.map(used)


@contextmanager
def collecting() -> Iterator["Collector"]:
    """Switch Python's own garbage collection off, as long as the context lasts; `Collector` has it instead."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()  # what lives now lives to the end: later collections pass it over
    try:
        yield Collector()
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


class Collector:
    """Collects garbage after every `COLLECT_EVERY`th step, the same one on every rank."""

    def after(self, step: int) -> None:
        """Collect, if it is time."""
        if step % COLLECT_EVERY == 0:
            gc.collect()
