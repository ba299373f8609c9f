"""What keeps the device from waiting for the host: batches copied in advance, and garbage collection at fixed steps."""

import gc
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ijepa.masking.batch import Batch

COLLECT_EVERY = 500
"""Steps between garbage collections."""


class DevicePrefetcher:
    """Copies batches to the device, on a GPU in a stream of its own.

    In the main stream, a copy would wait for the step before it. In its own stream it runs during that step, and the
    next step waits for the copy only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return `batch` on the device, for work that is queued after this call."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
        main = torch.cuda.current_stream(self._device)
        main.wait_stream(self._stream)

        def record(tensor: Tensor) -> Tensor:
            # Without it, the allocator could give the memory to the next copy while the step still reads it.
            tensor.record_stream(main)
            return tensor

        return moved.map(record)


class GarbageCollection:
    """Replaces Python's automatic garbage collection while the context lasts.

    A collection over all objects takes tens of milliseconds and comes on any rank at any moment, while all other ranks
    wait in the next collective. Here it comes on all ranks after the same step.
    """

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        gc.freeze()  # objects alive now live until the end, so later collections skip them
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def run(self, step: int) -> None:
        """Collect garbage after every `COLLECT_EVERY`th step."""
        if step % COLLECT_EVERY == 0:
            gc.collect()
