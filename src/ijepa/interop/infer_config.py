"""The `model` section of a recipe, inferred from the tensors of weights that come without one.

The shapes of tensors state width, depth, patch, MLP and grid. They do not state the number of attention heads, because
q, k and v of all heads are one matrix. It comes from, in this order: a configuration next to the tensors, the user,
known models of that width, a guess, which a note reports.
"""

import re

from ijepa.config.recipe import ModelSection
from ijepa.interop.positions import POSITIONS, PREDICTOR_POSITIONS, TOLERANCE, Positions, read_positions
from ijepa.interop.tensors import Tensors
from ijepa.utils.errors import UserError

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Attention heads by width: ViT-Ti, S, B, L, H, g and G of the original, timm and transformers."""
_HEAD_WIDTHS = (64, 80, 88, 96, 104, 72, 112, 128, 48, 32)
"""Channels per attention head in known Vision Transformers, the most common first."""
_OTHER_MODEL = "the file is incomplete or belongs to a different model"


def infer_encoder(
    tensors: Tensors, where: object, *, heads: int | None = None, image_size: tuple[int, int] | None = None
) -> tuple[ModelSection, list[str]]:
    """Return the `model` section that fits the tensors of an encoder, and notes for the user.

    Args:
        tensors: The tensors by their names in the original; without `image_size`, `pos_embed` (1, N, D) gives the grid.
        where: The file, for errors.
        heads: Number of attention heads, if known.
        image_size: Native height and width in pixels, if known.

    Raises:
        UserError: The tensors are not those of an I-JEPA encoder, or heads cannot be guessed.
    """
    kernel = _shape(tensors, "patch_embed.proj.weight", 4, where)  # (D, 3, patch, patch)
    if kernel[1] != 3 or kernel[2] != kernel[3] or 0 in kernel:
        raise UserError(
            where, f"patch_embed.proj.weight has shape {kernel}", "only 3 channels and square patches are supported"
        )
    width, patch = kernel[0], kernel[2]
    if width % 4:
        raise UserError(
            where, f"has width {width}, which is not a multiple of 4", "sin-cos positions need a multiple of 4"
        )
    if "cls_token" in tensors:
        raise UserError(where, "has a class token", "I-JEPA encoders have none; is this a model of a different method?")
    grid = (image_size[0] // patch, image_size[1] // patch) if image_size else None
    positions = read_positions(tensors, width, where, grid=grid)
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, where)[0]  # (hidden, D)
    notes = _drift_notes(positions, where)
    if heads is None and width not in HEADS:
        heads = _guess_heads(width, where)
        notes.append(
            f"the number of attention heads is not in {where}; {heads} x {width // heads} channels are assumed; "
            "--heads N sets a different number"
        )
    heads = heads or HEADS[width]
    if heads < 0 or width % heads:
        raise UserError(where, f"{heads} attention heads do not divide the width {width}", "give the right number")
    encoder = {
        "width": width,
        "depth": _depth(tensors, r"blocks\.(\d+)\.", where),
        "heads": heads,
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


def infer_predictor(model: ModelSection, tensors: Tensors, where: object) -> ModelSection:
    """Return `model` with the predictor that fits its tensors; it has as many heads as the encoder, as in the original.

    Raises:
        UserError: The tensors are not those of a predictor of this encoder.
    """
    width, outer = _shape(tensors, "predictor_embed.weight", 2, where)  # (predictor width, D)
    heads = model.encoder.heads
    if outer != model.encoder.width:
        raise UserError(where, f"the predictor needs {outer} channels, but the encoder has {model.encoder.width}")
    if width % heads or width % 4:
        raise UserError(where, f"the predictor's width {width} is not a multiple of 4 and of its {heads} heads")
    positions = read_positions(tensors, width, where, name=PREDICTOR_POSITIONS, grid=model.grid)
    if PREDICTOR_POSITIONS in tensors and positions.native != model.position_grid:
        raise UserError(where, f"{PREDICTOR_POSITIONS} and pos_embed have different grids", "they must agree")
    predictor = {
        "width": width,
        "depth": _depth(tensors, r"predictor_blocks\.(\d+)\.", where),
        "heads": heads,
        "mlp_ratio": _shape(tensors, "predictor_blocks.0.mlp.fc1.weight", 2, where)[0] / width,
        "position_scale": positions.scale,
    }
    return ModelSection.read({**model.model_dump(), "predictor": predictor}, str(where))


def check_positions(model: ModelSection, tensors: Tensors, where: object) -> list[str]:
    """Compare the position table of a second encoder with the model's, and return notes for the user.

    Raises:
        UserError: The tables differ.
    """
    found = read_positions(tensors, model.encoder.width, where, grid=model.grid)
    scale = model.encoder.position_scale
    same = found.native == model.position_grid and abs(found.scale - scale) <= TOLERANCE * scale
    if POSITIONS in tensors and not same:
        raise UserError(where, "the two encoders have different positions", "they must agree")
    return _drift_notes(found, where)


def _drift_notes(positions: Positions, where: object) -> list[str]:
    if not positions.drift:
        return []
    return [
        f"the positions in {where} differ from the sin-cos table by up to {positions.drift:.1e}, because the moving "
        "average of the original code rounds; the exact table is used"
    ]


def _guess_heads(width: int, where: object) -> int:
    for channels in _HEAD_WIDTHS:
        if width % channels == 0:
            return width // channels
    raise UserError(where, f"does not state the number of attention heads for width {width}", "add --heads N")


def _depth(tensors: Tensors, pattern: str, where: object) -> int:
    """Return the number of blocks, whose names match `pattern`."""
    numbers = {int(found[1]) for name in tensors if (found := re.match(pattern, name))}
    depth = len(numbers)  # blocks are numbered from 0 without gaps
    if not depth or numbers != set(range(depth)):
        missing = min(set(range(depth + 1)) - numbers)
        raise UserError(where, f"block {missing} is missing", _OTHER_MODEL)
    return depth


def _shape(tensors: Tensors, name: str, dimensions: int, where: object) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(where, f"{name} is missing", _OTHER_MODEL)
    shape = tensors[name].shape
    if len(shape) != dimensions:
        raise UserError(where, f"{name} has shape {shape}", f"expected {dimensions} dimensions")
    return shape
