"""The shape of an encoder or predictor, read from its tensors.

Weights from elsewhere come without a recipe. Width, depth, patch, MLP and grid stand in the tensors' shapes; the number
of attention heads does not, because q, k and v of all heads are one matrix. It is what the file says beside its
tensors, or what the field's models of that width have.
"""

import math
import re

import torch

from ijepa.errors import Refused
from ijepa.interop.tensors import Lazy, Tensors
from ijepa.model.vision_transformer import sincos_positions
from ijepa.recipe import Encoder, Model, Predictor

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Attention heads by width: ViT-Ti, S, B, L, H, g and G of the original, timm and transformers."""

_TOLERANCE = 1e-4
POSITIONS = "pos_embed"


def encoder_shape(
    tensors: Tensors, where: object, *, heads: int | None = None, image_size: tuple[int, int] | None = None
) -> Model:
    """Return the `model` section of a recipe that fits an encoder's tensors, named as the original names them.

    Args:
        tensors: of one encoder; without `image_size`, `pos_embed` (1, N, D) gives a square grid.
        where: the file, for errors.
        heads: attention heads, where they are known.
        image_size: native height and width in pixels, where they are known.

    Raises:
        Refused: tensors that are no such encoder's, positions other than sin-cos ones, heads that cannot be told.
    """
    kernel = _shape(tensors, "patch_embed.proj.weight", where)
    if len(kernel) != 4 or kernel[1] != 3 or kernel[2] != kernel[3]:
        raise Refused(where, f"patch_embed.proj.weight has shape {kernel}", "3 channels and square patches are read")
    width, patch = kernel[0], kernel[2]
    if "cls_token" in tensors:
        raise Refused(where, "has a class token", "I-JEPA's encoders have none: is it a model of another method?")
    if image_size is None:
        side = math.isqrt(_count(tensors, width, where))
        image_size = (side * patch, side * patch)
    grid = (image_size[0] // patch, image_size[1] // patch)
    scale = _position_scale(tensors, grid, width, where)
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", where)[0]
    return Model(
        image_size=image_size,
        patch_size=patch,
        encoder=Encoder(
            width=width,
            depth=_depth(tensors, r"blocks\.(\d+)\.", where),
            heads=_heads(width, heads, where),
            mlp_ratio=hidden / width,
            position_scale=scale,
        ),
    )


def with_predictor(model: Model, tensors: Tensors, where: object) -> Model:
    """Return `model` with the predictor that fits a predictor's tensors; it has the encoder's heads, as originally."""
    width, outer = _shape(tensors, "predictor_embed.weight", where)
    if outer != model.encoder.width:
        raise Refused(where, f"the predictor reads {outer} channels, the encoder has {model.encoder.width}")
    heads = model.encoder.heads
    if width % heads:
        raise Refused(where, f"{heads} heads do not divide the predictor's {width} channels")
    predictor = Predictor(
        width=width,
        depth=_depth(tensors, r"predictor_blocks\.(\d+)\.", where),
        heads=heads,
        mlp_ratio=_shape(tensors, "predictor_blocks.0.mlp.fc1.weight", where)[0] / width,
    )
    return model.model_copy(update={"predictor": predictor})


def without_positions(tensors: Tensors) -> dict[str, Lazy]:
    """Return the tensors without tables of positions, which are computed."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(POSITIONS)}


def _position_scale(tensors: Tensors, grid: tuple[int, int], width: int, where: object) -> float:
    """Return the factor on sin-cos positions that a table has; any other table is refused."""
    if POSITIONS not in tensors:
        return 1.0
    table, known = tensors[POSITIONS].make().float().reshape(-1, width), sincos_positions(width, grid)
    if len(table) != len(known):
        raise Refused(where, f"pos_embed has {len(table)} positions", f"a grid of {grid[0]} x {grid[1]} was expected")
    scale = float((table * known).sum() / known.square().sum())
    if not torch.allclose(table, scale * known, atol=_TOLERANCE):
        raise Refused(
            where, f"pos_embed is not the sin-cos table of {grid[0]} x {grid[1]} patches", "learned ones are not read"
        )
    return 1.0 if abs(scale - 1) < _TOLERANCE else round(scale, 6)


def _count(tensors: Tensors, width: int, where: object) -> int:
    count = torch.Size(_shape(tensors, POSITIONS, where)).numel() // width
    if math.isqrt(count) ** 2 != count:
        raise Refused(where, f"pos_embed has {count} positions", "only square grids are read from tensors alone")
    return count


def _heads(width: int, given: int | None, where: object) -> int:
    heads = given or HEADS.get(width)
    if heads is None:
        raise Refused(
            where,
            f"does not say how many attention heads {width} channels have",
            "import it: `ijepa import FILE OUT --heads N`",
        )
    if width % heads:
        raise Refused(f"--heads {heads}", f"does not divide the width {width}")
    return heads


def _depth(tensors: Tensors, pattern: str, where: object) -> int:
    numbers = {int(found[1]) for name in tensors if (found := re.match(pattern, name))}
    if not numbers or numbers != set(range(len(numbers))):
        lost = next((n for n in range(len(numbers) + 1) if n not in numbers), 0)
        raise Refused(where, f"block {lost} is missing", "the file is of another model, or not whole")
    return len(numbers)


def _shape(tensors: Tensors, name: str, where: object) -> tuple[int, ...]:
    if name not in tensors:
        raise Refused(where, f"{name} is missing", "the file is of another model, or not whole")
    return tensors[name].shape
