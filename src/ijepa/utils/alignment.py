"""Alignment of tensors in memory, on which the bits of some CPU kernels depend.

MKL's vector products, and its matrix products of few rows or columns, add in a different order if an operand does not
start at a multiple of 64 bytes (measured with torch 2.13 on an AMD EPYC). torch allocates memory at such multiples.
numpy does so only by chance, and a tensor in a mapped file or in shared memory starts anywhere. If all operands start
at multiples of 64 bytes, the same values give the same bits.
"""

from torch import Tensor

ALIGNMENT = 64
"""Bytes: the size of a cache line, and the alignment of memory that torch allocates."""


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that starts at a multiple of `ALIGNMENT` bytes: the same one if it does, else a copy."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
