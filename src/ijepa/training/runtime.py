"""The device of this process, and what `auto` means there: resolved once, saved in the run, kept by a resume."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch

from ijepa.config.recipe import Recipe
from ijepa.training.micro_batch import find_micro_batch_size
from ijepa.training.model_setup import check_float8
from ijepa.utils.allocator import bound_kernel_caches, keep_freed_memory
from ijepa.utils.cores import available_cores
from ijepa.utils.environment import gemm_rates


@dataclass(frozen=True)
class Resolved:
    """The values of `auto`, which `run.json` keeps so that a resume computes the same bits."""

    device: str
    autocast: bool
    micro: int
    workers: int
    threads: int


@dataclass(frozen=True)
class Numerics:
    """How a run computes what its recipe defines. Values other than the defaults tell rounding from mistakes."""

    dtype: torch.dtype = torch.float32
    """Dtype of the weights, gradients and moments."""
    fused_optimizer: bool = True
    """Only the fused optimizer skips void steps."""
    compile_backend: str | Callable[..., Any] = "inductor"
    """Backend of torch.compile."""


DEFAULT_NUMERICS = Numerics()


def resolve(recipe: Recipe, earlier: dict[str, Any] | None = None, ranks: int = 1) -> Resolved:
    """Resolve every `auto` of a recipe on this machine.

    Args:
        recipe: what is trained.
        earlier: what the same run has resolved before; a resume on a different number of ranks keeps the micro-batch as
            far as it divides a rank's share.
        ranks: processes that share the global batch.

    Raises:
        UserError: the recipe asks for something that this machine or version does not have.
    """
    earlier = earlier or {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        bound_kernel_caches()  # before `_autocast` multiplies matrices
    autocast = earlier["autocast"] if "autocast" in earlier else _autocast(recipe, device)
    check_float8(recipe, device, autocast=autocast)
    workers = recipe.data.workers
    if workers == "auto":
        cores = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = 1 if device.type == "cpu" else max(1, min(16, cores - 2))
    micro = recipe.batch.micro
    if micro == "auto":
        share = recipe.batch.total // ranks
        found = earlier.get("micro") or find_micro_batch_size(
            recipe, device, share=share, ranks=ranks, autocast=autocast
        )
        micro = gcd(found, share)
    threads = earlier.get("threads", torch.get_num_threads())
    return Resolved(device.type, autocast, micro, int(workers), threads)


def setup_device(resolved: Resolved, deterministic: bool) -> torch.device:
    """Set torch's threads, memory and precision as resolved, and return the device."""
    torch.set_num_threads(resolved.threads)
    if resolved.device == "cpu":
        keep_freed_memory()
        bound_kernel_caches()  # again, because only rank 0 resolves
    if resolved.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
        # TF32 only with autocast: without autocast, the recipe asks for float32 products.
        torch.set_float32_matmul_precision("high" if resolved.autocast else "highest")
    return torch.device(resolved.device)


def autocast_context(device: torch.device, autocast: bool) -> AbstractContextManager[Any]:
    """Return the context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=autocast)


def _autocast(recipe: Recipe, device: torch.device) -> bool:
    wanted = recipe.precision.autocast
    if wanted != "auto":
        return wanted == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bfloat16_pays(gemm_rates())


def bfloat16_pays(rates: Mapping[str, float]) -> bool:
    """Whether a CPU with these rates multiplies matrices in bfloat16 at least a quarter faster than in float32.

    Instruction sets do not tell: bfloat16 is between several times slower (without them) and several times faster, and
    with AVX-512's bfloat16 alone it depends on the CPU. No known CPU is so near to the limit that noise decides.
    """
    return rates["bfloat16"] > 1.25 * rates["float32"]
