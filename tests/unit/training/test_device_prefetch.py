"""Garbage is collected when we say, and a batch on the host stays where it is."""

import gc
import weakref

import torch

from ijepa.masking.batch import Batch, Sequences
from ijepa.training.device_prefetch import COLLECT_EVERY, DevicePrefetcher, GarbageCollection


class Knot:
    """Refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_at_our_steps_alone():
    with GarbageCollection() as garbage:
        assert not gc.isenabled()
        knot = weakref.ref(Knot())
        garbage.run(COLLECT_EVERY - 1)
        assert knot() is not None
        garbage.run(COLLECT_EVERY)
        assert knot() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_an_error_within_leaves_the_collector_as_it_was():
    gc.disable()
    try:
        with GarbageCollection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_batch_on_the_host_is_not_copied():
    one = Sequences(torch.arange(3), torch.tensor([0, 3], dtype=torch.int32), (3,))
    batch = Batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), one, one, one, one, torch.ones(3))
    fed = DevicePrefetcher(torch.device("cpu"))(batch)
    assert fed.pixels.data_ptr() == batch.pixels.data_ptr()
    assert fed.context.index.data_ptr() == batch.context.index.data_ptr()
