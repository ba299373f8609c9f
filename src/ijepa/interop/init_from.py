"""Pretraining that begins with weights that are there already: `init.from` in a recipe.

Weights of one resolution begin a run at another with the positions that they know: the table of the grid that they were
trained on, stretched over the run's, as evaluation does it too. `model.position_grid` records it; a recipe that sets
it has its own way. All else that decides what the weights mean must be the same: width, depth, heads, MLP, patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ijepa.config.recipe import Recipe
from ijepa.interop.infer_config import HEADS
from ijepa.interop.tensors import Lazy
from ijepa.interop.weights import resolve_weights
from ijepa.utils.config import BaseConfig
from ijepa.utils.errors import UserError

_PARTS = ("predictor", "context_encoder", "target_encoder")
_MATTER = ("width", "depth", "heads", "mlp_ratio", "position_scale")


@dataclass(frozen=True)
class Beginning:
    """Where a run's first weights come from.

    Attributes:
        label: what the run's record calls it.
        recipe: the recipe, with the grid that the weights' positions were made for.
        tensors: every tensor that is given, by its name in the model; made when it is asked for.
    """

    label: str
    recipe: Recipe
    tensors: dict[str, Callable[[], Tensor]]


def beginning(recipe: Recipe) -> Beginning | None:
    """Return what a recipe begins with, None where it draws all its weights.

    Raises:
        UserError: weights that are not there, lack a part, or are of another shape than the recipe's model.
    """
    if recipe.init.source is None:
        return None
    ours = recipe.model
    # Where neither the file nor its width says how many heads there are, the recipe does.
    found = resolve_weights(recipe.init.source, heads=None if ours.encoder.width in HEADS else ours.encoder.heads)
    theirs = found.recipe.model
    if ours.patch_size != theirs.patch_size:
        _refuse(recipe, "model.patch_size", theirs.patch_size, ours.patch_size)
    _compare(recipe, "model.encoder", ours.encoder, theirs.encoder)
    target = found.tensors("target_encoder" if "target_encoder" in found.parts else "context_encoder")
    if recipe.init.parts == "encoder":
        given = {"context_encoder": target, "target_encoder": target}
    else:
        if lost := [part for part in _PARTS if part not in found.parts]:
            raise UserError(
                f"init.from = {recipe.init.source}",
                f"has no {lost[0].replace('_', ' ')}, which init.parts = all would take",
                "add --init.parts encoder",
            )
        _compare(recipe, "model.predictor", ours.predictor, theirs.predictor)
        given = {part: found.tensors(part) for part in _PARTS}
    named: dict[str, Lazy] = {f"{part}.{name}": t for part, tensors in given.items() for name, t in tensors.items()}
    if ours.position_grid is None and (grid := theirs.position_grid or theirs.grid) != ours.grid:
        recipe = recipe.model_copy(update={"model": ours.model_copy(update={"position_grid": grid})})
    return Beginning(found.label, recipe, {name: tensor.make for name, tensor in named.items()})


def _compare(recipe: Recipe, section: str, ours: BaseConfig, theirs: BaseConfig) -> None:
    for key in _MATTER:
        mine, other = getattr(ours, key), getattr(theirs, key)
        if abs(mine - other) > 1e-6 * abs(other):
            _refuse(recipe, f"{section}.{key}", other, mine)


def _refuse(recipe: Recipe, key: str, theirs: object, ours: object) -> None:
    raise UserError(
        f"init.from = {recipe.init.source}", f"has {key} = {theirs}, the recipe {ours}", f"add --{key} {theirs}"
    )
