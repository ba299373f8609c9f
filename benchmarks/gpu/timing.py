"""Time and memory of a device: CUDA events on a GPU, which do not block; a clock on a CPU."""

import gc
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 operations per second in NVIDIA's data sheets (SXM; B200 as in HGX)."""


def published_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in sorted(PEAKS.items(), key=lambda pair: -len(pair[0])) if key in name), None)


class Clock:
    """Marks in the device's stream, read together at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self.marks.append((name, event))

    def seconds(self) -> list[tuple[str, float]]:
        """What came before each mark, by its name, after the first; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return [(name, before.elapsed_time(after) / 1e3) for (_, before), (name, after) in pairs]
        return [(name, after - before) for (_, before), (name, after) in pairs]


def median_seconds(device: torch.device, function: Callable[[], object], warm_up: int = 3, repeats: int = 10) -> float:
    for _ in range(warm_up):
        function()
    clock = Clock(device)
    clock.mark("begin")
    for _ in range(repeats):
        function()
        clock.mark("call")
    return sorted(seconds for _, seconds in clock.seconds())[repeats // 2]


def free(device: torch.device) -> None:
    """Let go of what the last measurement held."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
