"""`batch.micro: auto`: the largest micro-batch whose step fits into a device's memory.

The peak of a step is computed by `ijepa.planning.memory`, whose tests compare it with every byte alive in real steps.
A trial is not an option: if it fails on one rank, the others wait in a collective, and on a CPU it ends the process.
The answer is the same on every rank and at every start, and a resume keeps it.
"""

import os
from dataclasses import replace

import numpy as np
import torch

from ijepa.config.recipe import Recipe
from ijepa.distributed.launch import resolve_strategy
from ijepa.distributed.process_group import Strategy
from ijepa.model.padded_attention import KERNELS
from ijepa.planning.activations import activations
from ijepa.planning.memory import USABLE, divisors, fit, state
from ijepa.planning.size import count_parameters, count_tokens
from ijepa.training.model_setup import attention_of
from ijepa.utils.errors import UserError

USABLE_ON_CPU = 0.5
"""Share of a computer's memory for a step: workers, the page cache and other programs need memory too."""
_MOST = 1024
"""Images of a micro-batch; no device is faster with more."""


def find_micro_batch_size(recipe: Recipe, device: torch.device, *, share: int, ranks: int, autocast: bool) -> int:
    """Return the largest divisor of `share` that fits into the device's memory with the model.

    Args:
        recipe: what is trained.
        device: where it is trained.
        share: images of one rank and step.
        ranks: processes that share the global batch.
        autocast: whether linear layers compute in bfloat16.

    Raises:
        UserError: not even one image fits, or the device does not have the recipe's attention.
    """
    strategy = resolve_strategy(recipe, ranks)
    group, float8 = _group(recipe, strategy, ranks), recipe.precision.fp8 != "none"
    held = state(count_parameters(recipe), strategy, group, autocast=autocast, float8=float8)
    kernel, on_gpu = attention_of(recipe, device, autocast=autocast), device.type == "cuda"
    # Without FlashAttention, the attention scores (heads, N, N) of each sequence are saved for the backward pass.
    with_scores = kernel == "math" or (kernel == "auto" and not (on_gpu and autocast))
    tokens = count_tokens(recipe)
    if on_gpu and kernel in KERNELS:
        # These kernels pad sequences to an image's patches. To pad everything is an upper bound.
        tokens = replace(tokens, context=np.full_like(tokens.context, tokens.patches))
    each = activations(
        recipe.model, tokens, recipe.activation_checkpointing, autocast=autocast, with_scores=with_scores
    )
    usable = memory_of(device) * (USABLE if device.type == "cuda" else USABLE_ON_CPU)
    best = fit(held, recipe.activation_checkpointing, each, share, usable)
    if not best.micro:
        raise UserError(
            "batch.micro = auto",
            f"one image and the model need {best.peak / 2**30:.1f} GiB with {strategy}, and this device has "
            f"{usable / 2**30:.1f} GiB to use",
            "add --parallel.strategy zero3, more GPUs or --activation_checkpointing full; see `ijepa plan`",
        )
    return max(micro for micro in divisors(share) if micro <= min(best.micro, _MOST))


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group(recipe: Recipe, strategy: Strategy, ranks: int) -> int:
    """Return how many ranks share one copy of the model."""
    if strategy in ("none", "ddp"):
        return 1
    if strategy == "hsdp":
        named = recipe.parallel.shard
        return named if named != "auto" else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return ranks
