"""Initial weights of a run from existing weights: `init.from` in a recipe.

At another resolution, the run uses the positions of the weights, stretched over its own grid in the same way as in
evaluation. `model.position_grid` records the original grid; a recipe that sets it keeps its own positions. Everything
else that decides what the weights mean must agree: width, depth, heads, MLP, patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ijepa.config.recipe import Recipe
from ijepa.interop.infer_config import HEADS
from ijepa.interop.weights import resolve_weights
from ijepa.utils.config import BaseConfig
from ijepa.utils.errors import UserError

_PARTS = ("predictor", "context_encoder", "target_encoder")
_KEYS = ("width", "depth", "heads", "mlp_ratio", "position_scale")
"""Keys of an encoder or predictor that must agree."""


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights of a run.

    Attributes:
        label: Their source, for the record of the run.
        recipe: The recipe, with the grid that the positions of the weights were made for.
        tensors: Functions that load the given tensors, by name in the model.
    """

    label: str
    recipe: Recipe
    tensors: dict[str, Callable[[], Tensor]]


def initial_weights(recipe: Recipe) -> InitialWeights | None:
    """Return the weights that a recipe starts from; None if it draws all of them.

    Raises:
        UserError: The weights do not exist, lack a part, or do not have the shape of the recipe's model.
    """
    if recipe.init.source is None:
        return None
    ours = recipe.model
    # Neither the file nor an unknown width states the number of heads; the recipe does.
    weights = resolve_weights(recipe.init.source, heads=None if ours.encoder.width in HEADS else ours.encoder.heads)
    theirs = weights.recipe.model
    if ours.patch_size != theirs.patch_size:
        raise _differs(recipe, "model.patch_size", theirs.patch_size, ours.patch_size)
    _compare(recipe, "model.encoder", ours.encoder, theirs.encoder)
    if recipe.init.parts == "encoder":
        # An encoder alone is what others publish, so that both encoders start from it.
        encoder = weights.tensors("target_encoder" if "target_encoder" in weights.parts else "context_encoder")
        given = {"context_encoder": encoder, "target_encoder": encoder}
    else:
        if missing := [part for part in _PARTS if part not in weights.parts]:
            raise UserError(
                f"init.from = {recipe.init.source}",
                f"has no {missing[0].replace('_', ' ')}, which init.parts = all needs",
                "add --init.parts encoder",
            )
        _compare(recipe, "model.predictor", ours.predictor, theirs.predictor)
        given = {part: weights.tensors(part) for part in _PARTS}
    if ours.position_grid is None and (grid := theirs.position_grid or theirs.grid) != ours.grid:
        recipe = recipe.model_copy(update={"model": ours.model_copy(update={"position_grid": grid})})
    tensors = {f"{part}.{name}": tensor.load for part, named in given.items() for name, tensor in named.items()}
    return InitialWeights(weights.label, recipe, tensors)


def _compare(recipe: Recipe, section: str, ours: BaseConfig, theirs: BaseConfig) -> None:
    for key in _KEYS:
        mine, other = getattr(ours, key), getattr(theirs, key)
        # A ratio or factor that was computed from tensors differs from the recipe's by rounding.
        if abs(mine - other) > 1e-6 * abs(other):
            raise _differs(recipe, f"{section}.{key}", other, mine)


def _differs(recipe: Recipe, key: str, theirs: object, ours: object) -> UserError:
    return UserError(
        f"init.from = {recipe.init.source}", f"has {key} = {theirs}, but the recipe has {ours}", f"add --{key} {theirs}"
    )
