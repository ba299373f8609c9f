"""What this process computes on, and what `auto` means there: resolved once, recorded in the run, kept on resume."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any

import torch

from ijepa.allocator import bound_kernel_caches, keep_freed_memory
from ijepa.environment import available_cores
from ijepa.model.precision import check_float8
from ijepa.recipe import Recipe
from ijepa.training.fitting import largest_micro

_PRODUCTS = 5


@dataclass(frozen=True)
class Resolved:
    """What `auto` became. Saved in a run's `run.json`: a resume computes the same bits."""

    device: str
    autocast: bool
    micro: int
    workers: int
    threads: int

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def resolve(recipe: Recipe, earlier: dict[str, Any] | None = None, ranks: int = 1) -> Resolved:
    """Resolve every `auto` of a recipe on this machine; `earlier` is what the same run resolved before.

    `ranks` processes share the global batch; a run that goes on with another number of them keeps its micro-batch
    as far as it divides a rank's share.

    Raises:
        Refused: where the recipe asks for what this machine or version does not have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        bound_kernel_caches()  # before `_autocast` multiplies matrices
    kept = {key: earlier[key] for key in ("autocast", "threads") if key in earlier} if earlier else {}
    autocast = kept["autocast"] if "autocast" in kept else _autocast(recipe, device)
    if recipe.precision.fp8 != "none":
        check_float8(device, recipe.precision.fp8, autocast=autocast)
    threads = torch.get_num_threads()
    workers = recipe.data.workers
    if workers == "auto":
        workers = 1 if device.type == "cpu" else max(1, min(16, _cores() - 2))
    micro = recipe.batch.micro
    if micro == "auto":
        kept_micro = (earlier or {}).get("micro")
        share = recipe.batch.total // ranks
        found = kept_micro or largest_micro(recipe, device, share=share, ranks=ranks, autocast=autocast)
        micro = gcd(found, share)
    resolved = Resolved(
        device=device.type,
        autocast=autocast,
        micro=micro,
        workers=int(workers),
        threads=threads,
    )
    return replace(resolved, **kept)


def set_up(resolved: Resolved, deterministic: bool) -> torch.device:
    """Bring torch into the resolved state and return the device."""
    torch.set_num_threads(resolved.threads)
    if resolved.device == "cpu":
        keep_freed_memory()
        bound_kernel_caches()  # only the first rank resolves
    if resolved.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision("high")
    return torch.device(resolved.device)


def computing(device: torch.device, autocast: bool) -> AbstractContextManager[Any]:
    """Return the context in which a forward pass runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=autocast)


def _cores() -> int:
    """Cores that this process may use, shared with the other ranks of its machine."""
    return available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _autocast(recipe: Recipe, device: torch.device) -> bool:
    wanted = recipe.precision.autocast
    if wanted != "auto":
        return wanted == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bfloat16_pays(_product_seconds)


def bfloat16_pays(seconds: Callable[[torch.dtype], float]) -> bool:
    """Whether this CPU multiplies matrices in bfloat16 faster than in float32, by a quarter at least.

    Instruction sets do not tell: with AMX it is four times as fast, with AVX-512's bfloat16 alone twice or half as
    fast, and without either several times slower. Nobody's machine is near enough to the limit for noise to decide.

    Args:
        seconds: CPU time of one product in a dtype.
    """
    times = [
        (seconds(torch.float32), seconds(torch.bfloat16)) for _ in range(_PRODUCTS)
    ]  # in turns; the first warms up
    float32, bfloat16 = (min(each) for each in zip(*times[1:], strict=True))
    return 1.25 * bfloat16 < float32


def _product_seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(1024, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
    begun = time.process_time()
    x @ weight
    return time.process_time() - begun
