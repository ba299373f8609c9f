"""From a recipe's switches to a model that follows them: kernels, float8, recomputation, compilation, constant shapes.

None of them changes parameters or their names, so optimiser and checkpoints may be made before or after. Sharding comes
after all of it.
"""

import torch

from ijepa.config.recipe import Recipe
from ijepa.masking.packing import layer_rates
from ijepa.masking.token_budget import GRANULE, Budget
from ijepa.model.attention import Backend, flash_takes
from ijepa.model.float8 import TOKENS, to_float8, why_no_float8
from ijepa.model.ijepa import IJEPA
from ijepa.training.block_transforms import compile_blocks, recompute_blocks, set_attention
from ijepa.utils.errors import UserError


def prepare(model: IJEPA, recipe: Recipe, device: torch.device, *, autocast: bool) -> None:
    """Make `model`, which lies on `device`, attend, compute and remember as the recipe says, in place.

    `autocast` is what the recipe's was resolved to: linear layers compute in bfloat16.

    Raises:
        UserError: where the device cannot.
    """
    set_attention(model, attention_of(recipe, device, autocast=autocast))
    check_float8(recipe, device, autocast=autocast)
    if recipe.precision.fp8 != "none":
        to_float8(model, recipe.precision.fp8, recipe.precision.fp8_weight_gradient)
    recompute_blocks(model, recipe.activation_checkpointing)
    if compiles(recipe, device):
        compile_blocks(model)


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
    """Return what a recipe's attention is on `device`: the kernel it names, or for `auto` one that suits its switches.

    Raises:
        UserError: where the device does not have the kernel, or the kernel not the heads' width.
    """
    kernel, on_gpu = recipe.precision.attention, device.type == "cuda"
    if not on_gpu and kernel not in ("auto", "math"):
        raise UserError(f"precision.attention = {kernel}", f"needs a GPU, not a {device.type}", "use auto or math")
    if kernel not in ("auto", "flash"):
        return kernel
    if kernel == "flash" and not autocast:
        hint = "add --precision.autocast bf16, or use auto"
        raise UserError("precision.attention = flash", "computes in 16 bits only", hint)
    if not (on_gpu and autocast):
        return "math" if compiles(recipe, device) else "auto"  # the buckets have another shape at every step
    for name, part in (("encoder", recipe.model.encoder), ("predictor", recipe.model.predictor)):
        width = part.width // part.heads
        if not flash_takes(width):
            if kernel == "auto":
                return "math"
            raise UserError(
                "precision.attention = flash",
                f"takes heads whose width is a multiple of 8 and at most 256, not model.{name}'s {width}",
                f"use auto or math, or another model.{name}.heads",
            )
    return kernel


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Return whether blocks are compiled on `device`."""
    wanted = recipe.compile
    return device.type == "cuda" if wanted == "auto" else wanted


def token_budget(recipe: Recipe, micro: int, device: torch.device) -> Budget | None:
    """Return what batches of `micro` images are padded to on `device`; None to leave them as they come."""
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
