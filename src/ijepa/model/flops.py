"""Floating-point operations of a step, counted from its sequences: a multiply-add is 2, backward twice forward.

Linear layers cost 2 x weights x tokens, attention 4 x L^2 x D for each sequence and layer. Norms, activations and
softmax are left out, as is usual.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ijepa.masking.batch import Batch
from ijepa.model.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """Operations by part: `target` is forward only, the others forward and backward."""

    target: float
    context: float
    predictor: float

    @property
    def total(self) -> float:
        """All three parts."""
        return self.target + self.context + self.predictor


def layers_flops(lengths: npt.ArrayLike, width: int, mlp_ratio: float) -> float:
    """Forward operations of one transformer layer over sequences of these lengths."""
    long = np.asarray(lengths, dtype=np.float64)
    return float(2 * (4 + 2 * mlp_ratio) * width**2 * long.sum() + 4 * width * (long**2).sum())


def batch_flops(shape: ModelConfig, batch: Batch) -> Flops:
    """Operations that one micro-batch executes, layers dropped by stochastic depth left out."""
    encoder, predictor = shape.encoder, shape.predictor
    patch = 3 * shape.patch_size**2
    height, width = shape.image_size
    patches = height * width // shape.patch_size**2
    whole = [patches] * len(batch.context.lengths)
    context, queries = sum(batch.context.lengths), sum(batch.targets.lengths)
    target = encoder.depth * layers_flops(whole, encoder.width, encoder.mlp_ratio)
    target += 2 * patch * encoder.width * sum(whole)
    kept = batch.drop_path_rows or (None,) * encoder.depth
    seen = 2.0 * patch * encoder.width * context
    for layer in kept:
        lengths = batch.context.lengths if layer is None else layer.lengths
        seen += layers_flops(lengths, encoder.width, encoder.mlp_ratio)
    # Of the last predictor layer only queries and values are asked of all tokens, and the rest of the queries.
    d, whole_layer = predictor.width, layers_flops(batch.predictor.lengths, predictor.width, predictor.mlp_ratio)
    tokens = sum(batch.predictor.lengths)
    pairs = sum(q * k for q, k in zip(batch.targets.lengths, batch.predictor.lengths, strict=True))
    first = whole_layer - 6 * d * d * (tokens - context - queries)
    last = 6 * d * d * tokens + 2 * (1 + 2 * predictor.mlp_ratio) * d * d * queries + 4 * d * pairs
    guess = max(predictor.depth - 2, 0) * whole_layer + (first + last if predictor.depth > 1 else last)
    guess += 2 * encoder.width * d * (context + queries)
    return Flops(target, 3 * seen, 3 * guess)
