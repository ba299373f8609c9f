"""Garbage collection at fixed steps, and batches that are on the device already."""

import gc
import weakref

import torch

from ijepa.masking.batch import Batch, Sequences
from ijepa.training.device_prefetch import COLLECT_EVERY, DevicePrefetcher, GarbageCollection


class Knot:
    """Refers to itself, so only the garbage collection frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_collection_runs_at_its_steps_only():
    with GarbageCollection() as garbage:
        assert not gc.isenabled()
        knot = weakref.ref(Knot())
        garbage.run(COLLECT_EVERY - 1)
        assert knot() is not None
        garbage.run(COLLECT_EVERY)
        assert knot() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_garbage_collection_stays_disabled_if_it_was():
    gc.disable()
    try:
        with GarbageCollection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_device_prefetcher_does_not_copy_on_the_cpu():
    one = Sequences(torch.arange(3), torch.tensor([0, 3], dtype=torch.int32), (3,))
    batch = Batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), one, one, one, one, torch.ones(3))
    fed = DevicePrefetcher(torch.device("cpu"))(batch)
    assert fed.pixels.data_ptr() == batch.pixels.data_ptr()
    assert fed.context.index.data_ptr() == batch.context.index.data_ptr()
