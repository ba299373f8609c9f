"""The shape of an encoder or predictor, read from its tensors.

Weights from elsewhere come without a recipe. Width, depth, patch, MLP and grid stand in the tensors' shapes; the number
of attention heads does not, because q, k and v of all heads are one matrix. It is what the file says beside its
tensors, what the user says, what known models of that width have, or a guess that the user is told of.
"""

import re

from ijepa.config.recipe import ModelSection
from ijepa.interop.positions import POSITIONS, PREDICTOR_POSITIONS, TOLERANCE, Positions, read_positions
from ijepa.interop.tensors import Tensors
from ijepa.utils.errors import UserError

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Attention heads by width: ViT-Ti, S, B, L, H, g and G of the original, timm and transformers."""
_HEAD_WIDTHS = (64, 80, 88, 96, 104, 72, 112, 128, 48, 32)
"""Channels of an attention head in known Vision Transformers, the most common first."""


def encoder_shape(
    tensors: Tensors, where: object, *, heads: int | None = None, image_size: tuple[int, int] | None = None
) -> tuple[ModelSection, list[str]]:
    """Return the `model` section of a recipe that fits an encoder's tensors, and what the user should know about it.

    Args:
        tensors: of one encoder, named as the original names them; without `image_size`, `pos_embed` (1, N, D) gives
            the grid.
        where: the file, for errors.
        heads: attention heads, where they are known.
        image_size: native height and width in pixels, where they are known.

    Raises:
        UserError: tensors that are no such encoder's, positions other than sin-cos ones, heads that cannot be guessed.
    """
    kernel = _shape(tensors, "patch_embed.proj.weight", 4, where)
    if kernel[1] != 3 or kernel[2] != kernel[3] or 0 in kernel:
        raise UserError(where, f"patch_embed.proj.weight has shape {kernel}", "3 channels and square patches are read")
    width, patch = kernel[0], kernel[2]
    if width % 4:
        raise UserError(where, f"is {width} wide, not a multiple of 4", "sin-cos positions need one")
    if "cls_token" in tensors:
        raise UserError(where, "has a class token", "I-JEPA's encoders have none: is it a model of another method?")
    grid = (image_size[0] // patch, image_size[1] // patch) if image_size else None
    positions = read_positions(tensors, width, where, grid=grid)
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, where)[0]
    notes = _drift(positions, where)
    if heads is None and width not in HEADS:
        heads = _guessed(width, where)
        notes.append(
            f"the number of attention heads is not in {where}; {heads} x {width // heads} channels are assumed, "
            "--heads N sets another number"
        )
    encoder = {
        "width": width,
        "depth": _depth(tensors, r"blocks\.(\d+)\.", where),
        "heads": _heads(width, heads, where),
        "mlp_ratio": hidden / width,
        "position_scale": positions.scale,
    }
    values = {
        "image_size": image_size or tuple(side * patch for side in positions.grid),
        "patch_size": patch,
        "position_grid": positions.native,
        "encoder": encoder,
    }
    return ModelSection.read(values, str(where)), notes


def with_predictor(model: ModelSection, tensors: Tensors, where: object) -> ModelSection:
    """Return `model` with the predictor that fits a predictor's tensors; it has the encoder's heads, as originally.

    Raises:
        UserError: tensors that are no predictor's of this encoder, or positions other than its grid's sin-cos ones.
    """
    width, outer = _shape(tensors, "predictor_embed.weight", 2, where)
    if outer != model.encoder.width:
        raise UserError(where, f"the predictor reads {outer} channels, the encoder has {model.encoder.width}")
    heads = model.encoder.heads
    if width % heads or width % 4:
        raise UserError(where, f"{heads} heads, or sin-cos positions, do not divide the predictor's {width} channels")
    positions = read_positions(tensors, width, where, name=PREDICTOR_POSITIONS, grid=model.grid)
    if PREDICTOR_POSITIONS in tensors and positions.native != model.position_grid:
        raise UserError(where, f"{PREDICTOR_POSITIONS} is of another grid than pos_embed", "they must agree")
    predictor = {
        "width": width,
        "depth": _depth(tensors, r"predictor_blocks\.(\d+)\.", where),
        "heads": heads,
        "mlp_ratio": _shape(tensors, "predictor_blocks.0.mlp.fc1.weight", 2, where)[0] / width,
        "position_scale": positions.scale,
    }
    return ModelSection.read({**model.model_dump(), "predictor": predictor}, str(where))


def check_positions(model: ModelSection, tensors: Tensors, where: object) -> list[str]:
    """Compare a second encoder's table of positions with the model's; return what the user should know about it.

    Raises:
        UserError: the table is another one.
    """
    found = read_positions(tensors, model.encoder.width, where, grid=model.grid)
    if POSITIONS in tensors:
        scale = model.encoder.position_scale
        if found.native != model.position_grid or abs(found.scale - scale) > TOLERANCE * scale:
            raise UserError(where, "the two encoders have different positions", "they must agree")
    return _drift(found, where)


def _drift(positions: Positions, where: object) -> list[str]:
    if not positions.drift:
        return []
    return [
        f"the positions in {where} are up to {positions.drift:.1e} off the sin-cos table, as rounding in the "
        "original's moving average leaves them; the exact table is used"
    ]


def _guessed(width: int, where: object) -> int:
    for each in _HEAD_WIDTHS:
        if width % each == 0:
            return width // each
    raise UserError(where, f"does not say how many attention heads {width} channels have", "add --heads N")


def _heads(width: int, given: int | None, where: object) -> int:
    heads = given or HEADS[width]
    if heads < 0 or width % heads:
        raise UserError(where, f"{heads} attention heads do not divide the width {width}", "give the right number")
    return heads


def _depth(tensors: Tensors, pattern: str, where: object) -> int:
    numbers = {int(found[1]) for name in tensors if (found := re.match(pattern, name))}
    if not numbers or numbers != set(range(len(numbers))):
        lost = next((n for n in range(len(numbers) + 1) if n not in numbers), 0)
        raise UserError(where, f"block {lost} is missing", "the file is of another model, or not whole")
    return len(numbers)


def _shape(tensors: Tensors, name: str, dimensions: int, where: object) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(where, f"{name} is missing", "the file is of another model, or not whole")
    shape = tensors[name].shape
    if len(shape) != dimensions:
        raise UserError(where, f"{name} has shape {shape}", f"{dimensions} dimensions were expected")
    return shape
