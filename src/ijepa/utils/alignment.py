"""Where tensors lie in memory, which some of a CPU's kernels make bits depend on.

MKL's vector products, and its matrix products of few rows or columns, add in another order if an operand does not start
at a multiple of 64 bytes (measured with torch 2.13 on an AMD EPYC). torch allocates at such multiples. numpy does so by
chance only, and a tensor in a mapped file or in shared memory is where its bytes are. If all operands start at
multiples of 64 bytes, the same values give the same bits.
"""

from torch import Tensor

ALIGNMENT = 64
"""Bytes: a line of the cache, and what torch aligns its own memory to."""


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that starts at a multiple of `ALIGNMENT` bytes: the same one if it does, else a copy."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
