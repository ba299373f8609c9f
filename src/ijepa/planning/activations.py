"""Memory that a forward pass leaves for the backward pass, from what each layer saves.

A pre-norm block over T tokens, d wide, with an MLP of h = ratio x d, saves of every token (r bytes an element in the
residual stream, always float32; a in what linear layers take: bfloat16 or float32):

    both norms' inputs                  2 r d, and their mean and deviation, 16
    inputs of qkv and fc1               2 a d
    queries, keys, values, the result   4 a d, and FlashAttention's log-sum-exp, 4 a head
    MLP before and after GELU           2 a h

With checkpointing `selective` a block keeps its input and what matrix products and attention return, and computes norms
and GELU anew; with `full` it keeps its input alone and is computed anew as a whole. Figures are for FlashAttention, as
on a GPU: elsewhere the probabilities come on top (`with_scores`). Indices and what is saved of masks are left out, less
than 1 %. Float8 linear layers save their input in bfloat16 and change nothing here.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ijepa.model.config import ModelConfig

Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

_STREAM = 4
"""Bytes of an element of the residual stream, of norms, targets and loss."""


@dataclass(frozen=True)
class Tokens:
    """How many tokens each of I images has.

    Attributes:
        patches: of an image, N.
        context: (I,) patches of the context.
        blocks: (I, M) patches of each target block, 0 for one that was not placed.
        kept: (I, L) whether stochastic depth keeps a layer of the context encoder for an image.
    """

    patches: int
    context: Integers
    blocks: Integers
    kept: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Activations:
    """Bytes of each of I images.

    Attributes:
        saved: (I,) what the forward pass leaves for the backward pass.
        passing: (I,) what lies beside it when most is in use: at the forward pass's end the target encoder's output
            and what the loss takes from it, or, with checkpointing, a block that is computed anew.
    """

    saved: Reals
    passing: Reals

    def peak(self, micro: int, deviations: float = 4.0) -> float:
        """Bytes that `micro` images need at most: the mean over images, and so many standard deviations of a sum."""
        each = self.saved + self.passing
        return micro * float(each.mean()) + deviations * micro**0.5 * float(each.std())


def activations(
    shape: ModelConfig,
    tokens: Tokens,
    checkpointing: Checkpointing,
    *,
    autocast: bool = True,
    with_scores: bool = False,
) -> Activations:
    """Bytes of activations of each image, with weights not counted.

    Args:
        shape: the model's.
        tokens: those of the images.
        checkpointing: what is kept of a block, in both context encoder and predictor.
        autocast: linear layers compute in bfloat16, else in float32.
        with_scores: attention saves its probabilities, as it does outside FlashAttention.
    """
    a = 2 if autocast else _STREAM
    encoder, predictor = shape.encoder, shape.predictor
    wide, narrow = encoder.width, predictor.width
    context, layers = tokens.context.astype(np.float64), tokens.kept.sum(1)
    queries = tokens.blocks.sum(1).astype(np.float64)
    lengths = np.where(tokens.blocks > 0, tokens.blocks + tokens.context[:, None], 0).astype(np.float64)
    sequences = lengths.sum(1)

    outer = _Block(wide, round(wide * encoder.mlp_ratio), encoder.heads, a, with_scores)
    inner = _Block(narrow, round(narrow * predictor.mlp_ratio), predictor.heads, a, with_scores)
    pixels = 3 * shape.patch_size**2
    seen = layers * outer.saved(context, context**2, checkpointing)
    seen = seen + context * (a * pixels + _STREAM * wide + 8)  # patches, and the input of the last norm

    # Everything else than blocks: the context's projection, the last norm, the projection, prediction and target.
    guessed = a * context * wide + queries * ((_STREAM + a) * narrow + 8 + 2 * _STREAM * wide)
    pairs = (lengths**2).sum(1)
    last_pairs = (tokens.blocks * lengths).sum(1)
    if predictor.depth > 1:
        middle = (predictor.depth - 2) * inner.saved(sequences, pairs, checkpointing)
        first = inner.saved(sequences, pairs, checkpointing)
        if checkpointing == "none":  # norm and qkv of a token are computed once, for all blocks of its image
            first = first - (sequences - context - queries) * ((_STREAM + a) * narrow + 8)
        guessed = guessed + first + middle
    guessed = guessed + inner.saved_last(sequences, queries, last_pairs, checkpointing)

    # Output, targets and their squares, or the loss over them; means at the targets; the context's pixels and output.
    held = 2 * tokens.patches * wide + np.maximum(tokens.patches, queries) * wide + queries * wide
    loss = _STREAM * (held + context * (pixels + wide)) + 2 * tokens.patches * pixels
    if checkpointing == "none":
        return Activations(seen + guessed, np.asarray(loss))
    anew = np.maximum(
        outer.saved(context, context**2, "none") + outer.gradients(context),
        inner.saved(sequences, pairs, "none") + inner.gradients(sequences),
    )
    return Activations(seen + guessed, np.maximum(loss, anew))


@dataclass(frozen=True)
class _Block:
    """One transformer layer: d wide, h in the MLP, `a` bytes an element of what linear layers take."""

    width: int
    hidden: int
    heads: int
    a: int
    with_scores: bool

    def saved(self, tokens: Reals, pairs: Reals, checkpointing: Checkpointing) -> Reals:
        """Bytes saved over `tokens` tokens and `pairs` pairs of query and key."""
        d, h, a = self.width, self.hidden, self.a
        attention = tokens * 4 * a * d + (a * self.heads * pairs if self.with_scores else 4 * self.heads * tokens)
        if checkpointing == "full":
            return tokens * _STREAM * d
        if checkpointing == "selective":
            return attention + tokens * (_STREAM * d + a * (2 * d + h))
        return attention + tokens * (2 * _STREAM * d + 16 + 2 * a * d + 2 * a * h)

    def saved_last(self, tokens: Reals, queries: Reals, pairs: Reals, checkpointing: Checkpointing) -> Reals:
        """Bytes saved by the layer that asks `queries` of `tokens` tokens alone."""
        d, h, a = self.width, self.hidden, self.a
        if checkpointing == "full":
            return tokens * _STREAM * d
        before = tokens * (_STREAM * d + 8 + 3 * a * d) + queries * 2 * a * d
        before = before + (a * self.heads * pairs if self.with_scores else 4 * self.heads * queries)
        if checkpointing == "selective":
            return before + queries * a * (2 * d + h)
        if self.with_scores:  # the layer's own queries alone are laid out anew
            before = before - tokens * a * d
        return before + tokens * a * d + queries * (_STREAM * d + 8 + a * d + 2 * a * h)

    def gradients(self, tokens: Reals) -> Reals:
        """Bytes of gradients in flight within the layer: of the MLP's two inner tensors and the residual stream."""
        return tokens * (2 * self.a * self.hidden + 2 * _STREAM * self.width)
