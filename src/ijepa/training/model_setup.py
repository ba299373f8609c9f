"""Applies a recipe's switches to a model: attention, float8, activation checkpointing, compilation, padding.

None of them changes parameters or their names, so optimizer and checkpoints may be made before or after. Sharding comes
last.
"""

from collections.abc import Callable
from typing import Any

import torch

from ijepa.config.recipe import Recipe
from ijepa.masking.packing import layer_rates
from ijepa.masking.token_budget import GRANULE, Budget
from ijepa.model.attention import Backend, flash_takes
from ijepa.model.float8 import TOKENS, to_float8, why_no_float8
from ijepa.model.ijepa import IJEPA
from ijepa.training.block_transforms import checkpoint_activations, compile_blocks, set_attention
from ijepa.utils.errors import UserError


def setup_model(
    model: IJEPA,
    recipe: Recipe,
    device: torch.device,
    *,
    autocast: bool,
    compile_backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Apply the recipe's switches to a model that computes on `device`, in place.

    Args:
        model: on `device` or on the meta device.
        recipe: the switches.
        device: where the model computes.
        autocast: the resolved value: linear layers compute in bfloat16.
        compile_backend: backend of torch.compile.

    Raises:
        UserError: a switch that the device does not support.
    """
    set_attention(model, attention_of(recipe, device, autocast=autocast))
    check_float8(recipe, device, autocast=autocast)
    if recipe.precision.fp8 != "none":
        to_float8(model, recipe.precision.fp8, recipe.precision.fp8_weight_gradient)
    checkpoint_activations(model, recipe.activation_checkpointing)
    if compiles(recipe, device):
        compile_blocks(model, compile_backend)


def check_float8(recipe: Recipe, device: torch.device, *, autocast: bool) -> None:
    """Check that `device` can compute in float8 if the recipe asks for it.

    Raises:
        UserError: it cannot.
    """
    scaling = recipe.precision.fp8
    if scaling != "none":
        problem = why_no_float8(device, scaling, autocast=autocast)
        if problem:
            others = "--precision.fp8 none" + (" or tensorwise" if scaling == "rowwise" else "")
            raise UserError(f"precision.fp8 = {scaling}", problem, f"add {others}")


def attention_of(recipe: Recipe, device: torch.device, *, autocast: bool) -> Backend:
    """Return the attention kernel on `device`: the one that the recipe names, or for `auto` one that fits its switches.

    Raises:
        UserError: the device does not have the kernel, or the kernel does not support the width of the heads.
    """
    kernel, on_gpu = recipe.precision.attention, device.type == "cuda"
    if not on_gpu and kernel not in ("auto", "math"):
        raise UserError(
            f"precision.attention = {kernel}", f"needs a GPU, but the device is {device.type}", "use auto or math"
        )
    if kernel not in ("auto", "flash"):
        return kernel
    if kernel == "flash" and not autocast:
        hint = "add --precision.autocast bf16, or use auto"
        raise UserError("precision.attention = flash", "computes in 16 bits only", hint)
    if not (on_gpu and autocast):
        # auto's buckets have other shapes at every step, and each shape would be compiled.
        return "math" if compiles(recipe, device) else "auto"
    for name, part in (("encoder", recipe.model.encoder), ("predictor", recipe.model.predictor)):
        width = part.width // part.heads
        if not flash_takes(width):
            if kernel == "auto":
                return "math"
            raise UserError(
                "precision.attention = flash",
                f"needs heads whose width is a multiple of 8 and at most 256, but model.{name} has {width}",
                f"use auto or math, or a different model.{name}.heads",
            )
    return kernel


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Return whether blocks are compiled on `device`."""
    wanted = recipe.compile
    return device.type == "cuda" if wanted == "auto" else wanted


def token_budget(recipe: Recipe, micro: int, device: torch.device) -> Budget | None:
    """Return the budget to which batches of `micro` images are padded on `device`, None for no padding."""
    shape, precision = recipe.model, recipe.precision
    rates = layer_rates(shape.encoder.depth, shape.encoder.drop_path)
    wanted = recipe.batch.pad_to_budget
    static = device.type == "cuda" if wanted == "auto" else wanted
    if static or compiles(recipe, device):
        granule = GRANULE if device.type == "cuda" else TOKENS
        return Budget.for_masks(recipe.mask, shape.grid, micro, rates, granule=granule)
    if precision.fp8 != "none":
        return Budget.aligned(shape.grid, rates, TOKENS)
    return None
