import pytest
import torch

from ijepa.utils.alignment import ALIGNMENT, aligned


@pytest.mark.parametrize("shift", [4, 32, 60])
def test_aligned_copies_a_tensor_that_is_not_aligned(shift):
    memory = torch.arange(64, dtype=torch.float32)
    start = (-memory.data_ptr() % ALIGNMENT + shift) // 4
    tensor = memory[start : start + 8]
    copy = aligned(tensor)
    assert tensor.data_ptr() % ALIGNMENT == shift and copy.data_ptr() % ALIGNMENT == 0
    assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()


def test_aligned_returns_an_aligned_tensor_itself():
    tensor = torch.zeros(8)  # torch aligns its memory
    assert aligned(tensor) is tensor
