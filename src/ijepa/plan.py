"""What a recipe asks for, before any of it is spent: parameters, operations, steps, bytes. Needs no device.

Parameters are counted on torch's meta device; operations from 2,048 masks drawn as the run will draw them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ijepa.model.flops import Flops, batch_flops
from ijepa.model.jepa import build_encoder
from ijepa.model.predictor import Predictor
from ijepa.packing import Packer
from ijepa.recipe import Lengths, Recipe

_MASKS = 2048
_STATE_BYTES = 4 + 4 + 8  # float32 weight, gradient and two moments of what is trained


@dataclass(frozen=True)
class Plan:
    """The size and cost of a recipe.

    Attributes:
        encoder, predictor: parameters of one encoder (there are two) and of the predictor.
        context_tokens, target_tokens: mean patches of an image's context and of one target block.
        full: operations an image and step, if no layer were dropped by stochastic depth.
        executed: operations an image and step that are executed.
        lengths: whole steps, where the size of the data set is known.
        state_bytes: weights, gradients, moments and the target encoder, float32, on one device.
    """

    encoder: int
    predictor: int
    context_tokens: float
    target_tokens: float
    full: Flops
    executed: Flops
    lengths: Lengths | None
    state_bytes: int


def plan(recipe: Recipe, images: int | None = None) -> Plan:
    """Plan a recipe for a data set of `images` images (the recipe's own figure if not given)."""
    shape = recipe.model
    with torch.device("meta"):
        encoder = sum(p.numel() for p in build_encoder(shape).parameters())
        predictor = Predictor(
            grid=shape.grid,
            encoder_width=shape.encoder.width,
            width=shape.predictor.width,
            depth=shape.predictor.depth,
            heads=shape.predictor.heads,
            mlp_ratio=shape.predictor.mlp_ratio,
        )
        guess = sum(p.numel() for p in predictor.parameters())

    def operations(drop_path: float) -> tuple[Flops, float, float]:
        packer = Packer(recipe.mask, shape.grid, recipe.seed, _MASKS, shape.encoder.depth, drop_path)
        batch = packer(np.arange(_MASKS), torch.empty(0))
        found = batch_flops(shape, batch)
        each = Flops(found.target / _MASKS, found.context / _MASKS, found.predictor / _MASKS)
        return each, float(np.mean(batch.context.lengths)), float(np.mean(batch.targets.lengths))

    full, context, target = operations(0.0)
    executed = operations(shape.encoder.drop_path)[0] if shape.encoder.drop_path else full
    count = images or recipe.data.images
    known = recipe.steps is not None or recipe.images is not None
    lengths = recipe.lengths(count or 1) if count or known else None
    return Plan(
        encoder=encoder,
        predictor=guess,
        context_tokens=context,
        target_tokens=target,
        full=full,
        executed=executed,
        lengths=lengths,
        state_bytes=_STATE_BYTES * (encoder + guess) + 4 * encoder,
    )


def describe(recipe: Recipe, images: int | None = None) -> str:
    """Return the resolved recipe and its plan as text."""
    found, whole = plan(recipe, images), recipe.batch.total
    grid = recipe.model.grid
    lines = [
        recipe.dump().rstrip(),
        "",
        f"parameters        {found.encoder / 1e6:.1f} M context + {found.encoder / 1e6:.1f} M target encoder, "
        f"{found.predictor / 1e6:.1f} M predictor",
        f"patches           {grid[0]} x {grid[1]}; {found.context_tokens:.1f} context, "
        f"{found.target_tokens:.1f} a target block",
        f"an image          {found.full.total / 1e9:.4g} GFLOP (target {found.full.target / 1e9:.4g}, context "
        f"{found.full.context / 1e9:.4g}, predictor {found.full.predictor / 1e9:.4g}), "
        f"{found.executed.total / 1e9:.4g} executed",
        f"a step            {whole} images, {found.executed.total * whole / 1e12:.4g} TFLOP",
        f"weights and state {found.state_bytes / 2**30:.2f} GiB on one device, activations not counted",
    ]
    if found.lengths:
        total = found.lengths.total
        lines.append(
            f"the run           {total} steps ({found.lengths.warmup} of warm-up), {total * whole / 1e6:.4g} M images, "
            f"{found.executed.total * total * whole / 1e18:.4g} EFLOP"
        )
    else:
        lines.append("the run           length unknown without the data: add --data.path or --data.images")
    return "\n".join(lines)
