"""Tensors of a batch in memory that two processes share."""

import os

import pytest
import torch

from ijepa.data.loading.shared_memory import SharedMemory, anonymous_file

SHAPE = (2, 1, 3, 34, 30)  # two slots with space for 768 bytes; the pixels do not end at a multiple of 64


@pytest.fixture
def ends():
    descriptor = anonymous_file(SHAPE)
    yield SharedMemory(descriptor, SHAPE), SharedMemory(descriptor, SHAPE)
    os.close(descriptor)


def test_pixels_and_sample_are_shared(ends):
    worker, parent = ends
    worker.pixels[1].fill_(7)
    worker.sample[0] = 2**40
    assert parent.pixels.shape == SHAPE and (parent.pixels[1] == 7).all() and not parent.pixels[0].any()
    assert parent.sample[0] == 2**40


@pytest.mark.parametrize("count", [1, 88, 89, 1000])  # from 89 numbers on, they do not fit next to the other tensors
def test_dumps_and_loads_tensors_that_fit_or_not(ends, count):
    worker, parent = ends
    value = {
        "long": torch.arange(count) - 2,
        "none": torch.empty(0, dtype=torch.int32),
        "flags": torch.tensor([[True], [False]]),
        "name": "of it",
    }
    found = parent.loads(worker.dumps(value, 1), 1)
    assert found["name"] == "of it" and list(found) == list(value)
    for key in ("long", "none", "flags"):
        assert found[key].dtype == value[key].dtype and torch.equal(found[key], value[key])
        assert found[key].data_ptr() % 64 == 0  # the bits of some kernels depend on it
    assert (worker.spaces[1].tobytes() != bytes(768)) == (count <= 88)


def test_slots_are_aligned(ends):
    for end in ends:
        places = [slot.data_ptr() for slot in end.pixels]
        places += [torch.frombuffer(room, dtype=torch.uint8).data_ptr() for room in end.spaces]
        assert not any(place % 64 for place in places)


def test_loads_returns_copies_and_slots_are_separate(ends):
    worker, parent = ends
    messages = [worker.dumps(torch.full((4,), slot), slot) for slot in (0, 1)]
    first, second = (parent.loads(message, slot) for slot, message in enumerate(messages))
    worker.dumps(torch.full((4,), 9), 0)
    first.add_(1)
    assert first.tolist() == [1] * 4 and second.tolist() == [1] * 4
    assert not worker.pixels.any()
