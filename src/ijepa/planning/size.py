"""The size of a recipe: parameters, tokens, operations, steps. Needs no device and reads no data.

Parameters are counted on torch's meta device; operations and tokens from 2,048 masks drawn as the run will draw them.
"""

from collections.abc import Sequence
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

_MASKS = 2048
_STATE_BYTES = 4 + 4 + 8  # float32 weight, gradient and two moments of what is trained


@dataclass(frozen=True)
class Parameters:
    """How many parameters there are, and how many of them are in linear layers, which bfloat16 copies are made of.

    Attributes:
        encoder: one encoder; there are two.
        encoder_blocks: the linear layers of its blocks, biases included.
        block: those of one block.
        predictor: the predictor.
        autocast: what autocast copies of the predictor and of the patch embedding.
    """

    encoder: int
    encoder_blocks: int
    block: int
    predictor: int
    autocast: int

    @property
    def trained(self) -> int:
        """Context encoder and predictor."""
        return self.encoder + self.predictor


@dataclass(frozen=True)
class Plan:
    """The size and cost of a recipe.

    Attributes:
        parameters: how many parameters, by part.
        tokens: the tokens of 2,048 images as the run will draw them.
        plain: operations an image and step as the method is written, every predictor layer on every token.
        full: the same without what is computed once here or never read; both with every encoder layer.
        executed: operations an image and step that are executed, stochastic depth's dropped layers left out.
        lengths: whole steps, where the size of the data set is known.
        state_bytes: weights, gradients, moments and the target encoder, float32, on one device.
    """

    parameters: Parameters
    tokens: Tokens
    plain: Flops
    full: Flops
    executed: Flops
    lengths: Lengths | None
    state_bytes: int

    @property
    def encoder(self) -> int:
        """Parameters of one encoder."""
        return self.parameters.encoder

    @property
    def predictor(self) -> int:
        """Parameters of the predictor."""
        return self.parameters.predictor

    @property
    def context_tokens(self) -> float:
        """Mean patches of an image's context."""
        return float(self.tokens.context.mean())

    @property
    def target_tokens(self) -> float:
        """Mean patches of a target block."""
        return float(self.tokens.blocks[self.tokens.blocks > 0].mean())


def plan(recipe: Recipe, images: int | None = None) -> Plan:
    """Plan a recipe for a data set of `images` images (the recipe's own figure if not given)."""
    shape = recipe.model
    masks, depth = _draw(recipe)
    batch = pack(masks, torch.empty(0), _MASKS)
    full = batch_flops(shape, batch)
    executed = full if depth is None else batch_flops(shape, pack(masks, torch.empty(0), _MASKS, depth))
    layers = layers_flops(batch.predictor.lengths, shape.predictor.width, shape.predictor.mlp_ratio)
    projections = 2 * shape.encoder.width * shape.predictor.width * sum(batch.predictor.lengths)
    plain = Flops(full.target, full.context, 3 * (shape.predictor.depth * layers + projections))
    count = images or recipe.data.images
    known = recipe.steps is not None or recipe.images is not None
    parameters = count_parameters(recipe)
    return Plan(
        parameters=parameters,
        tokens=_tokens(recipe, masks, depth),
        plain=_each(plain),
        full=_each(full),
        executed=_each(executed),
        lengths=recipe.lengths(count or 1) if count or known else None,
        state_bytes=_STATE_BYTES * parameters.trained + 4 * parameters.encoder,
    )


def count_parameters(recipe: Recipe) -> Parameters:
    """Count parameters on torch's meta device."""
    shape = recipe.model
    with torch.device("meta"):
        encoder = VisionTransformer(shape)
        predictor = Predictor(shape)
    linear = [module for module in predictor.modules() if isinstance(module, torch.nn.Linear)]
    blocks = [module for module in encoder.blocks.modules() if isinstance(module, torch.nn.Linear)]  # type: ignore[attr-defined]
    inside = _count(blocks)
    return Parameters(
        encoder=_count([encoder]),
        encoder_blocks=inside,
        block=inside // shape.encoder.depth,
        predictor=_count([predictor]),
        autocast=_count([*linear, encoder.patch_embed]),
    )


def count_tokens(recipe: Recipe) -> Tokens:
    """Count the tokens of 2,048 images as the run will draw them."""
    return _tokens(recipe, *_draw(recipe))


def _draw(recipe: Recipe) -> tuple[Masks, npt.NDArray[np.bool_] | None]:
    """Masks and stochastic depth of the run's first images."""
    shape, positions = recipe.model, np.arange(_MASKS)
    masks = draw_masks(recipe.mask, shape.grid, recipe.seed, positions)
    return masks, draw_drop_path(recipe.seed, positions, shape.encoder.depth, shape.encoder.drop_path)


def _tokens(recipe: Recipe, masks: Masks, depth: npt.NDArray[np.bool_] | None) -> Tokens:
    grid, layers = recipe.model.grid, recipe.model.encoder.depth
    return Tokens(
        patches=grid[0] * grid[1],
        context=masks.context.sum(1).astype(np.int64),
        blocks=masks.targets.sum(2).astype(np.int64),
        kept=np.ones((_MASKS, layers), dtype=np.bool_) if depth is None else depth,
    )


def _count(modules: Sequence[torch.nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _each(whole: Flops) -> Flops:
    return Flops(whole.target / _MASKS, whole.context / _MASKS, whole.predictor / _MASKS)
