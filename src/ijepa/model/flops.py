"""Floating-point operations of a step, counted from its sequences.

A multiply-add counts as 2 operations, and the backward pass as twice the forward pass. Linear layers cost
2 x weights x tokens, and attention costs 4 x L^2 x D per sequence of length L and layer. Norms, activations and softmax
are not counted, as is usual.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ijepa.masking.batch import Batch
from ijepa.model.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """Operations of each part: `target` is the forward pass only, the others forward and backward."""

    target: float
    context: float
    predictor: float

    @property
    def total(self) -> float:
        """Operations of all three parts."""
        return self.target + self.context + self.predictor


def layers_flops(lengths: npt.ArrayLike, width: int, mlp_ratio: float) -> float:
    """Return the forward operations of one transformer layer for sequences (S,) of these lengths."""
    long = np.asarray(lengths, dtype=np.float64)
    # Weights: 3 D^2 in qkv, D^2 in proj, and 2 r D^2 in the MLP.
    return float(2 * (4 + 2 * mlp_ratio) * width**2 * long.sum() + 4 * width * (long**2).sum())


def batch_flops(config: ModelConfig, batch: Batch) -> Flops:
    """Return the operations that one micro-batch executes; layers that stochastic depth drops are not counted."""
    encoder = config.encoder
    embedding = 2 * 3 * config.patch_size**2 * encoder.width  # operations for one patch
    whole = [config.grid[0] * config.grid[1]] * len(batch.context.lengths)
    target = encoder.depth * layers_flops(whole, encoder.width, encoder.mlp_ratio) + embedding * sum(whole)
    context = float(embedding * sum(batch.context.lengths))
    for rows in batch.drop_path_rows or (None,) * encoder.depth:
        lengths = batch.context.lengths if rows is None else rows.lengths
        context += layers_flops(lengths, encoder.width, encoder.mlp_ratio)
    return Flops(target, 3 * context, 3 * _predictor_flops(config, batch))


def _predictor_flops(config: ModelConfig, batch: Batch) -> float:
    """Return the forward operations of the predictor."""
    width, ratio, depth = config.predictor.width, config.predictor.mlp_ratio, config.predictor.depth
    queries, tokens = sum(batch.targets.lengths), sum(batch.predictor.lengths)
    distinct = sum(batch.context.lengths) + queries  # tokens before the context is repeated for each block
    pairs = sum(q * k for q, k in zip(batch.targets.lengths, batch.predictor.lengths, strict=True))
    layer = layers_flops(batch.predictor.lengths, width, ratio)
    # The first layer computes qkv (3 D^2 weights) once per distinct token.
    first = layer - 6 * width**2 * (tokens - distinct)
    # The last layer computes qkv for all tokens and everything else for the queries.
    last = 6 * width**2 * tokens + 2 * (1 + 2 * ratio) * width**2 * queries + 4 * width * pairs
    blocks = (depth - 2) * layer + (first + last) if depth > 1 else last
    # The projections: from the encoder's width for context tokens, and back to it for queries.
    return blocks + 2 * config.encoder.width * width * distinct
