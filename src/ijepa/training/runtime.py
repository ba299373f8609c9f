"""What this process computes on, and what `auto` means there: resolved once, recorded in the run, kept on resume."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any

import torch

from ijepa.config.recipe import Recipe
from ijepa.training.micro_batch import largest_micro
from ijepa.training.model_setup import check_float8
from ijepa.utils.allocator import bound_kernel_caches, keep_freed_memory
from ijepa.utils.cores import available_cores
from ijepa.utils.environment import gemm_rates


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
        UserError: where the recipe asks for what this machine or version does not have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        bound_kernel_caches()  # before `_autocast` multiplies matrices
    kept = {key: earlier[key] for key in ("autocast", "threads") if key in earlier} if earlier else {}
    autocast = kept["autocast"] if "autocast" in kept else _autocast(recipe, device)
    check_float8(recipe, device, autocast=autocast)
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
        # TF32 only beside bfloat16: without autocast, float32 products are what was asked for.
        torch.set_float32_matmul_precision("high" if resolved.autocast else "highest")
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
    return bfloat16_pays(gemm_rates())


def bfloat16_pays(rates: Mapping[str, float]) -> bool:
    """Whether a CPU of these rates multiplies matrices in bfloat16 faster than in float32, by a quarter at least.

    Instruction sets do not say: bfloat16 is from several times slower (without them) to several times faster, and with
    AVX-512's bfloat16 alone it depends on the CPU. No known CPU is near enough to the limit for noise to decide.
    """
    return rates["bfloat16"] > 1.25 * rates["float32"]
