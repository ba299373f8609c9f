"""The number of CPU cores of a process."""

import os


def available_cores() -> int:
    """Return the number of cores that this process may use, which its CPU affinity limits.

    macOS has no CPU affinity; there it is the number of cores of the machine.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
