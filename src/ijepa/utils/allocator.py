"""Memory that a process keeps on a CPU: freed memory in the C library, and compiled kernels in oneDNN.

glibc returns large freed blocks to the kernel at once and requests them again a moment later; the kernel then has to
map and zero every page again. A training step frees and allocates its activations repeatedly, and on a CPU this is a
tenth of its time. With `keep_freed_memory`, the process stays at its peak size until it ends, and does not exceed it.

oneDNN compiles a kernel for every shape that it meets in bfloat16. By default torch keeps 1024 of them in each of two
caches, up to a gigabyte that fills over thousands of steps. A quarter of that is enough for a step.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt, see malloc.h
_KERNELS = 256


def keep_freed_memory() -> bool:
    """Make this process keep freed memory for its next tensors; return False if the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def bound_kernel_caches() -> None:
    """Make oneDNN keep few kernels, unless the environment sets the number. Call it before the first product."""
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's cache, and oneDNN's own
        os.environ.setdefault(name, str(_KERNELS))
