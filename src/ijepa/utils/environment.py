"""The environment of a measurement, which result files state: command, versions, commit, devices, speed of the CPU."""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa import __version__
from ijepa.utils.cores import available_cores

_ROUNDS = 5
_SECONDS = 0.5
"""CPU time after which no further round starts. A CPU that emulates bfloat16 needs half of it for one product."""
_INSTRUCTIONS = ("avx", "fma", "amx", "neon", "dot", "fp16", "bf16", "i8mm", "sve", "sme")
"""First letters of the instruction sets that matrix products use."""


def machine() -> dict[str, Any]:
    """Return command, versions, commit, devices and CPU of this process."""
    described = cpu()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions(),
        "commit": commit(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        or [f"{described['name']} CPU, {available_cores()} cores"],
        "cpu": described,
    }


def cpu() -> dict[str, Any]:
    """Describe the CPU.

    Returns:
        `name`, its model; `instructions`, the instruction sets that matrix products use; `torch`, the set that torch's
        own kernels use; and without a GPU `gemm`, the result of `gemm_rates`.
    """
    has = torch.cpu.get_capabilities()
    found: dict[str, Any] = {
        "name": _name(),
        "instructions": sorted(name for name, value in has.items() if value is True and name.startswith(_INSTRUCTIONS)),
        "torch": torch.backends.cpu.get_cpu_capability(),
    }
    return found if torch.cuda.is_available() else {**found, "gemm": dict(gemm_rates())}


@cache
def gemm_rates() -> Mapping[str, float]:
    """Return GFLOP per CPU-second of a matrix product in `float32` and `bfloat16`, measured once per process."""
    return measured_rates(_product_seconds)


def measured_rates(seconds: Callable[[torch.dtype], float]) -> dict[str, float]:
    """Return the best rate of both dtypes, which take turns; the first round, which compiles, is left out.

    Args:
        seconds: measures the CPU time of one product in a dtype.
    """
    rounds: list[tuple[float, float]] = []
    while len(rounds) < 2 or (len(rounds) < _ROUNDS and sum(map(sum, rounds)) < _SECONDS):
        rounds.append((seconds(torch.float32), seconds(torch.bfloat16)))
    float32, bfloat16 = (2 * _M * _K * _N / 1e9 / min(each) for each in zip(*rounds[1:], strict=True))
    return {"float32": round(float32, 1), "bfloat16": round(bfloat16, 1)}


_M, _K, _N = 1024, 384, 1536
"""Sizes of the measured product: tokens, width and hidden width of an MLP in ViT-S."""


def _product_seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(_M, _K, dtype=dtype), torch.ones(_K, _N, dtype=dtype)
    start = time.process_time()
    x @ weight
    return time.process_time() - start


def _name() -> str:
    """Return the CPU's model, and on Linux its family: the names of some cloud machines do not tell the model."""
    named: dict[str, str] = {}
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    except OSError:  # not Linux
        pass
    name = torch.cpu.get_capabilities().get("cpu_name") or named.get("model name")
    if not name and sys.platform == "darwin":
        sysctl = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(sysctl, capture_output=True, text=True, check=False).stdout.strip()
    family = f" (family {named['cpu family']}, model {named.get('model')})" if "cpu family" in named else ""
    return (name or platform.processor() or platform.machine()) + family


def versions() -> dict[str, str]:
    """Return the versions that results may depend on."""
    return {
        "ijepa": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def commit() -> str | None:
    """Return the commit of the checkout that contains this package; None without a checkout or without git."""
    here = Path(__file__).resolve().parent
    if not (here.parents[2] / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
