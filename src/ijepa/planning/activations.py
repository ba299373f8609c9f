"""Memory that a forward pass leaves for the backward pass, counted from what each layer saves.

A pre-norm block of width d with an MLP of h = ratio x d saves the following bytes per token. The residual stream takes
r = 4 bytes per element (always float32), the inputs of linear layers a = 2 (bfloat16) or 4 (float32):

    inputs of both norms                2 r d, and their mean and deviation, 16
    inputs of qkv and fc1               2 a d
    queries, keys, values, the result   4 a d, and the log-sum-exp of FlashAttention, 4 per head
    MLP before and after GELU           2 a h

The count follows Korthikanti et al., "Reducing activation recomputation in large transformer models" (arXiv 2205.05198,
section 4), without dropout and with FlashAttention (Dao, arXiv 2307.08691), which saves no attention matrix. Other
attention kernels save it (`with_scores`). With `activation_checkpointing: selective` a block keeps its input and the
results of matrix products and attention, and computes norms and GELU again; with `full` it keeps only its input.
Indices and masks are not counted; they are less than 1 %. Float8 linear layers save their input in bfloat16, so that
float8 changes nothing here.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ijepa.model.config import ModelConfig

ActivationCheckpointing = Literal["none", "selective", "full"]
ACTIVATION_CHECKPOINTING: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

_FLOAT32 = 4
"""Bytes per element of the residual stream, norms, targets and loss."""


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens of I images.

    Attributes:
        patches: Patches of an image, N.
        context: (I,) patches of the context block.
        blocks: (I, M) patches of each target block, 0 for a block that was not placed.
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
        passing: (I,) what else is in memory at the peak: at the end of the forward pass the target encoder's output and
            what the loss computes from it or, with activation checkpointing, a block that is computed again.
    """

    saved: Reals
    passing: Reals

    def peak(self, micro: int, deviations: float = 4.0) -> float:
        """Return the bytes that `micro` images need: the mean, plus `deviations` standard deviations of their sum."""
        each = self.saved + self.passing
        return micro * float(each.mean()) + deviations * micro**0.5 * float(each.std())


def activations(
    shape: ModelConfig,
    tokens: Tokens,
    checkpointing: ActivationCheckpointing,
    *,
    autocast: bool = True,
    with_scores: bool = False,
) -> Activations:
    """Return the bytes of activations of each image, without weights.

    Args:
        shape: The model.
        tokens: The tokens of the images.
        checkpointing: `activation_checkpointing` of the recipe, for context encoder and predictor.
        autocast: Linear layers compute in bfloat16, else in float32.
        with_scores: Attention saves its matrix, as it does without FlashAttention.
    """
    a = 2 if autocast else _FLOAT32
    encoder, predictor = shape.encoder, shape.predictor
    wide, narrow = encoder.width, predictor.width
    context, layers = tokens.context.astype(np.float64), tokens.kept.sum(1)  # (I,) each
    queries = tokens.blocks.sum(1).astype(np.float64)
    # A predictor sequence holds the context and one target block: (I, M) lengths, (I,) tokens and attention pairs.
    lengths = np.where(tokens.blocks > 0, tokens.blocks + tokens.context[:, None], 0).astype(np.float64)
    sequences, pairs = lengths.sum(1), (lengths**2).sum(1)

    encoder_block = _Block(wide, round(wide * encoder.mlp_ratio), encoder.heads, a, with_scores)
    predictor_block = _Block(narrow, round(narrow * predictor.mlp_ratio), predictor.heads, a, with_scores)
    pixels = 3 * shape.patch_size**2
    saved = layers * encoder_block.saved(context, context**2, checkpointing)
    saved = saved + context * (a * pixels + _FLOAT32 * wide + 8)  # patches, and the input of the last norm

    # The predictor outside its blocks: projection of the context, last norm, projection back, prediction and target.
    saved = saved + a * context * wide + queries * ((_FLOAT32 + a) * narrow + 8 + 2 * _FLOAT32 * wide)
    if predictor.depth > 1:
        saved = saved + (predictor.depth - 1) * predictor_block.saved(sequences, pairs, checkpointing)
        if checkpointing == "none":  # the first block computes norm and qkv of a token once for all blocks of an image
            saved = saved - (sequences - context - queries) * ((_FLOAT32 + a) * narrow + 8)
    last_pairs = (tokens.blocks * lengths).sum(1)
    saved = saved + predictor_block.saved_by_last(sequences, queries, last_pairs, checkpointing)

    # Output, targets and their squares, or the loss over them; means at the targets; the context's pixels and output.
    held = 2 * tokens.patches * wide + np.maximum(tokens.patches, queries) * wide + queries * wide
    loss = _FLOAT32 * (held + context * (pixels + wide)) + 2 * tokens.patches * pixels
    if checkpointing == "none":
        return Activations(saved, np.asarray(loss))
    recomputed = np.maximum(
        encoder_block.saved(context, context**2, "none") + encoder_block.gradients(context),
        predictor_block.saved(sequences, pairs, "none") + predictor_block.gradients(sequences),
    )
    return Activations(saved, np.maximum(loss, recomputed))


@dataclass(frozen=True)
class _Block:
    """One transformer block: width d, hidden width h of the MLP, `a` bytes per element in linear layers."""

    width: int
    hidden: int
    heads: int
    a: int
    with_scores: bool

    def saved(self, tokens: Reals, pairs: Reals, checkpointing: ActivationCheckpointing) -> Reals:
        """Return the bytes saved over `tokens` tokens and `pairs` pairs of query and key."""
        d, h, a = self.width, self.hidden, self.a
        if checkpointing == "full":
            return tokens * _FLOAT32 * d
        attention = tokens * 4 * a * d + self._softmax(tokens, pairs)
        if checkpointing == "selective":
            return attention + tokens * (_FLOAT32 * d + a * (2 * d + h))
        return attention + tokens * (2 * _FLOAT32 * d + 16 + 2 * a * d + 2 * a * h)

    def saved_by_last(
        self, tokens: Reals, queries: Reals, pairs: Reals, checkpointing: ActivationCheckpointing
    ) -> Reals:
        """Return the bytes saved by the last layer, which computes keys of all tokens and the rest of the queries."""
        d, h, a = self.width, self.hidden, self.a
        if checkpointing == "full":
            return tokens * _FLOAT32 * d
        saved = tokens * (_FLOAT32 * d + 8 + 3 * a * d) + queries * 2 * a * d + self._softmax(queries, pairs)
        if checkpointing == "selective":
            return saved + queries * a * (2 * d + h)
        # The attention matrix needs keys, values and the layer's own queries; FlashAttention keeps qkv of all tokens.
        copied = 0 if self.with_scores else a * d
        return saved + tokens * copied + queries * (_FLOAT32 * d + 8 + a * d + 2 * a * h)

    def gradients(self, tokens: Reals) -> Reals:
        """Return the bytes of gradients inside the block: of two hidden tensors of the MLP and the residual stream."""
        return tokens * (2 * self.a * self.hidden + 2 * _FLOAT32 * self.width)

    def _softmax(self, queries: Reals, pairs: Reals) -> Reals:
        """Return the bytes of attention probabilities or, with FlashAttention, of a log-sum-exp per query and head."""
        return self.a * self.heads * pairs if self.with_scores else 4 * self.heads * queries
