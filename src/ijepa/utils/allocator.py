"""What a process keeps on a CPU: the C library's memory between a step's tensors, and oneDNN's kernels.

glibc gives large freed blocks back to the kernel at once and asks for them again a moment later; every page then has
to be mapped and zeroed anew. A training step frees and takes its activations over and over, and on a CPU a tenth of
it goes into that. Told to keep what it has, the process stays at its peak size until it ends, and no more.

oneDNN compiles a kernel for every shape it meets in bfloat16. torch keeps 1024 in each of two caches by default, up to
a gigabyte that fills over thousands of steps. A quarter of that is enough for a step, and full within a hundred.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's mallopt, malloc.h
_KERNELS = 256


def keep_freed_memory() -> bool:
    """Make this process keep freed memory for its next tensors; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def bound_kernel_caches() -> None:
    """Let oneDNN keep few kernels, unless the environment says how many; to be called before the first product."""
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's cache of them, and oneDNN's own
        os.environ.setdefault(name, str(_KERNELS))
