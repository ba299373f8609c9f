"""The C library's memory, kept between a step's tensors.

glibc gives large freed blocks back to the kernel at once and asks for them again a moment later; every page then has
to be mapped and zeroed anew. A training step frees and takes its activations over and over, and on a CPU a tenth of
it goes into that. Told to keep what it has, the process stays at its peak size until it ends, and no more.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's mallopt, malloc.h


def keep_freed_memory() -> bool:
    """Make this process keep freed memory for its next tensors; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
