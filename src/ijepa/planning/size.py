"""The size of a recipe: parameters, tokens, operations, steps. Needs no GPU and reads no data.

Parameters are counted on torch's meta device. Operations and tokens are means over the first 2,048 sets of masks that
the run will draw. An operation is counted as in `ijepa.model.flops`: 2 per multiply-add, backward twice forward.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ijepa.config.recipe import Lengths, Recipe
from ijepa.masking.masks import Masks, draw_masks
from ijepa.masking.packing import draw_drop_path, pack
from ijepa.model.flops import Flops, batch_flops, layers_flops
from ijepa.model.predictor import Predictor
from ijepa.model.vision_transformer import VisionTransformer
from ijepa.planning.activations import Tokens

_IMAGES = 2048


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, and of those in linear layers, which have copies in bfloat16.

    Attributes:
        encoder: One encoder; there are two.
        encoder_blocks: Linear layers of the blocks of one encoder, biases included.
        block: Linear layers of one of these blocks.
        predictor: The predictor.
        autocast: What autocast copies of the predictor and the patch embedding.
    """

    encoder: int
    encoder_blocks: int
    block: int
    predictor: int
    autocast: int

    @property
    def trained(self) -> int:
        """Parameters of the context encoder and the predictor."""
        return self.encoder + self.predictor

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients, two AdamW moments and the target encoder in float32, on one device."""
        return (4 + 4 + 8) * self.trained + 4 * self.encoder


@dataclass(frozen=True)
class RecipeSize:
    """The size of a recipe, as far as it does not depend on the hardware.

    Attributes:
        parameters: Numbers of parameters, by part.
        tokens: Tokens of the first images of the run.
        plain: FLOP per image and step as the method is written, every predictor layer on every token.
        full: The same without what is computed once for all blocks or never read. Both with every encoder layer.
        executed: FLOP per image and step that are executed: without the layers that stochastic depth drops.
        lengths: Steps of the run; None if the size of the data set is unknown.
    """

    parameters: Parameters
    tokens: Tokens
    plain: Flops
    full: Flops
    executed: Flops
    lengths: Lengths | None

    @property
    def context_tokens(self) -> float:
        """Mean number of context patches of an image."""
        return float(self.tokens.context.mean())

    @property
    def target_tokens(self) -> float:
        """Mean number of patches of a target block."""
        return float(self.tokens.blocks[self.tokens.blocks > 0].mean())


def measure_recipe(recipe: Recipe, images: int | None = None) -> RecipeSize:
    """Return the size of a recipe for a data set of `images` images; None: the number that the recipe states."""
    model = recipe.model
    masks, depth = _draw(recipe)
    batch = pack(masks, torch.empty(0), _IMAGES)
    full = batch_flops(model, batch)
    executed = full if depth is None else batch_flops(model, pack(masks, torch.empty(0), _IMAGES, depth))
    # As written, each block of an image projects the context again and every layer computes all tokens.
    layer = layers_flops(batch.predictor.lengths, model.predictor.width, model.predictor.mlp_ratio)
    projections = 2 * model.encoder.width * model.predictor.width * sum(batch.predictor.lengths)
    plain = Flops(full.target, full.context, 3 * (model.predictor.depth * layer + projections))
    count = images or recipe.data.images
    known = count or recipe.steps is not None or recipe.images is not None
    return RecipeSize(
        parameters=count_parameters(recipe),
        tokens=_tokens(recipe, masks, depth),
        plain=_per_image(plain),
        full=_per_image(full),
        executed=_per_image(executed),
        lengths=recipe.lengths(count or 1) if known else None,
    )


def count_parameters(recipe: Recipe) -> Parameters:
    """Count the parameters of a recipe's model without memory for them."""
    shape = recipe.model
    with torch.device("meta"):
        encoder = VisionTransformer(shape)
        predictor = Predictor(shape)
    in_blocks = _count(layer for block in encoder.blocks for layer in _linear_layers(block))
    return Parameters(
        encoder=_count([encoder]),
        encoder_blocks=in_blocks,
        block=in_blocks // shape.encoder.depth,
        predictor=_count([predictor]),
        autocast=_count([*_linear_layers(predictor), encoder.patch_embed]),
    )


def count_tokens(recipe: Recipe) -> Tokens:
    """Count the tokens of the first 2,048 images of the run."""
    return _tokens(recipe, *_draw(recipe))


def _draw(recipe: Recipe) -> tuple[Masks, npt.NDArray[np.bool_] | None]:
    """Draw the masks and the stochastic depth (I, L) of the run's first images."""
    encoder, positions = recipe.model.encoder, np.arange(_IMAGES)
    masks = draw_masks(recipe.mask, recipe.model.grid, recipe.seed, positions)
    return masks, draw_drop_path(recipe.seed, positions, encoder.depth, encoder.drop_path)


def _tokens(recipe: Recipe, masks: Masks, depth: npt.NDArray[np.bool_] | None) -> Tokens:
    rows, columns = recipe.model.grid
    every = np.ones((_IMAGES, recipe.model.encoder.depth), dtype=np.bool_)
    return Tokens(
        patches=rows * columns,
        context=masks.context.sum(1).astype(np.int64),  # (I, N) -> (I,)
        blocks=masks.targets.sum(2).astype(np.int64),  # (I, M, N) -> (I, M)
        kept=every if depth is None else depth,
    )


def _linear_layers(module: torch.nn.Module) -> Iterable[torch.nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, torch.nn.Linear))


def _count(modules: Iterable[torch.nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _per_image(total: Flops) -> Flops:
    return Flops(total.target / _IMAGES, total.context / _IMAGES, total.predictor / _IMAGES)
