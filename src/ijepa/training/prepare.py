"""From a recipe's switches to a model that follows them: kernels, float8, recomputation, compilation, constant shapes.

None of them changes parameters or their names, so optimiser and checkpoints may be made before or after. Sharding comes
after all of it.
"""

import torch

from ijepa.budget import GRANULE, Budget
from ijepa.errors import Refused
from ijepa.model.blocks import compile_blocks, recompute_blocks, set_attention
from ijepa.model.jepa import IJEPA
from ijepa.model.precision import TOKENS, check_float8, to_float8
from ijepa.packing import layer_rates
from ijepa.recipe import Recipe


def prepare(model: IJEPA, recipe: Recipe, device: torch.device) -> None:
    """Make `model`, which lies on `device`, attend, compute and remember as the recipe says, in place.

    Raises:
        Refused: where the device cannot.
    """
    backend = recipe.precision.attention
    if device.type != "cuda" and backend not in ("auto", "math"):
        raise Refused(f"precision.attention = {backend}", f"needs a GPU, not a {device.type}", "use auto or math")
    if backend == "flash" and recipe.precision.autocast == "none":
        raise Refused("precision.attention = flash", "computes in 16 bits only", "add --precision.autocast bf16")
    if backend == "auto" and device.type != "cuda" and compiles(recipe, device):
        backend = "math"  # the buckets of a CPU have another shape at every step
    set_attention(model, backend)
    if recipe.precision.fp8 != "none":
        check_float8(device, recipe.precision.fp8, autocast=recipe.precision.autocast != "none")
        to_float8(model, recipe.precision.fp8, recipe.precision.fp8_weight_gradient)
    recompute_blocks(model, recipe.parallel.recompute)
    if compiles(recipe, device):
        compile_blocks(model)


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Return whether blocks are compiled on `device`."""
    wanted = recipe.parallel.compile
    return device.type == "cuda" if wanted == "auto" else wanted


def token_budget(recipe: Recipe, micro: int, device: torch.device) -> Budget | None:
    """Return what batches of `micro` images are padded to on `device`; None to leave them as they come."""
    shape, precision, parallel = recipe.model, recipe.precision, recipe.parallel
    rates = layer_rates(shape.encoder.depth, shape.encoder.drop_path)
    static = device.type == "cuda" if parallel.static == "auto" else parallel.static
    if static or compiles(recipe, device):
        granule = GRANULE if device.type == "cuda" else TOKENS
        return Budget.for_masks(recipe.mask, shape.grid, micro, rates, granule=granule)
    if precision.fp8 != "none":
        return Budget.aligned(shape.grid, rates, TOKENS)
    return None
