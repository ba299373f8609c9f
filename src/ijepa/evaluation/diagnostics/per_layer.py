"""Diagnosis of what the pooled output does not show: the input of the final norm, all blocks, and several views.

A LayerNorm hides collapse, because it rescales whatever deviation is left to length one. Its input is read by a hook on
the final norm of the encoder, which is applied to every block that is asked for: one pass over the images gives the
metrics of all blocks before and after the norm.

LiDAR (Thilak et al., arXiv 2312.04000) is the effective rank of the scatter between images relative to the scatter
between views of one image. Views are contexts, drawn by the mask rule of pretraining.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ijepa.config.recipe import MaskSection
from ijepa.data.sources.base import Source
from ijepa.evaluation.diagnostics.metrics import (
    BATCH,
    Moments,
    entropy_rank,
    feature_metrics,
    measure_features,
    nan_to_none,
    verdict,
)
from ijepa.evaluation.features.extract import Indices, PatchEncoder, device_of, encoder_blocks
from ijepa.evaluation.features.sampling import choose, crops
from ijepa.masking.batch import Sequences
from ijepa.masking.masks import draw_masks
from ijepa.model.encoder import FrozenEncoder
from ijepa.model.vision_transformer import patchify

LIDAR_DELTA, LIDAR_EPS = 1e-4, 1e-7


def lidar(views: Tensor, delta: float = LIDAR_DELTA) -> float:
    """Return LiDAR of features (n, q, D) of q views of n images, at most min(n - 1, D).

    Args:
        views: the features.
        delta: regularization of the scatter within images; the paper has 1e-4.
    """
    wide = views.double()
    centers = wide.mean(1)  # (n, D)
    within = (wide - centers[:, None]).flatten(0, 1)  # (n * q, D)
    between = centers - centers.mean(0)
    scatter = within.T @ within / len(within) + delta * torch.eye(wide.shape[2], dtype=wide.dtype)
    values, vectors = torch.linalg.eigh(scatter)
    # The eigenvalues of W^-1/2 B W^-1/2 with B = between^T between / n are squared singular values of a smaller matrix.
    return entropy_rank(torch.linalg.svdvals(between @ vectors / values.sqrt()).square(), LIDAR_EPS)


@torch.no_grad()
def context_views(
    encoder: FrozenEncoder,
    source: Source,
    chosen: Indices,
    size: tuple[int, int],
    rule: MaskSection,
    views: int,
    seed: int,
    layers: int = 1,
) -> Tensor:
    """Return the mean token (L, n, q, D) float32 of `views` contexts of each image, each context encoded separately.

    L counts the last `layers` blocks, earliest first, after the final norm.

    Raises:
        UserError: a mask rule that does not fit the grid of this size.
        RunError: an image cannot be decoded.
    """
    grid = size[0] // encoder.patch_size, size[1] // encoder.patch_size
    rule.check_grid(grid)
    found = []
    for start in range(0, len(chosen), BATCH):
        some = chosen[start : start + BATCH]
        pixels = crops(source, some, size).to(device_of(encoder))
        patches = encoder.pixel_norm(patchify(pixels, encoder.patch_size))  # (B * N, 3 * p * p)
        means = []
        for view in range(views):
            # Each view of each image has its own position in the stream of masks.
            context = draw_masks(rule, grid, seed, some * views + view).context  # (B, N) bool
            lengths = context.sum(1)
            rows = torch.from_numpy(np.flatnonzero(context)).to(patches.device)
            starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(patches.device)
            sequences = Sequences(rows, starts, tuple(lengths.tolist()))
            outputs = encoder.vit(patches[rows], sequences, grid=grid, last=layers)
            parts = [output.float().split(lengths.tolist()) for output in outputs]
            means.append(torch.stack([torch.stack([part.mean(0) for part in block]) for block in parts]))  # (L, B, D)
        found.append(torch.stack(means, dim=2).cpu())
    return torch.cat(found, dim=1)


@contextmanager
def record_norm_inputs(norm: object) -> Iterator[list[Tensor]]:
    """Collect the inputs (T, D) of an encoder's final norm, one for each call; none if `norm` is not a module."""
    seen: list[Tensor] = []
    if not isinstance(norm, nn.Module):
        yield seen
        return
    hook = norm.register_forward_pre_hook(lambda module, given: seen.append(given[0].float().cpu()))
    try:
        yield seen
    finally:
        hook.remove()


def final_norm(encoder: PatchEncoder) -> object:
    """Return the final norm of an encoder, None if it has none."""
    return getattr(getattr(encoder, "vit", None), "norm", None)


class TokenStd:
    """Running standard deviation of each channel over all tokens."""

    def __init__(self) -> None:
        self.count, self.sum, self.square = 0, torch.zeros(1), torch.zeros(1)

    def add(self, tokens: Tensor) -> None:
        """Add tokens (T, D)."""
        wide = tokens.double()
        self.count += len(wide)
        self.sum, self.square = self.sum + wide.sum(0), self.square + wide.square().sum(0)

    @property
    def value(self) -> float:
        """Mean standard deviation over channels; 0 without tokens."""
        mean = self.sum / max(1, self.count)
        return float((self.square / max(1, self.count) - mean.square()).clamp_min(0).sqrt().mean())

    @property
    def relative(self) -> float:
        """`value` relative to the root mean square of the tokens; 0 if all are zero."""
        size = float((self.square / max(1, self.count)).mean().sqrt())
        return self.value / size if size else 0.0


@torch.no_grad()
def per_layer_diagnostics(
    encoder: PatchEncoder, source: Source, chosen: Indices, size: tuple[int, int], layers: int
) -> list[dict[str, float | None]]:
    """Return the metrics of the last `layers` blocks, earliest first.

    Each has `layer` (counted from 1), `std_before_norm` and `relative_std_before_norm` (of each channel over all
    patches, if the encoder has a final norm), and those of `feature_metrics`.

    Raises:
        RunError: an image cannot be decoded, or features are not finite.
    """
    moments: list[Moments] = []
    stds: list[TokenStd] = []
    for start in range(0, len(chosen), BATCH):
        pixels = crops(source, chosen[start : start + BATCH], size).to(device_of(encoder))
        with record_norm_inputs(final_norm(encoder)) as inputs:
            outputs = encoder.forward_blocks(pixels, layers)
        moments = moments or [Moments() for _ in outputs]
        stds = stds or [TokenStd() for _ in inputs]
        for moment, output in zip(moments, outputs, strict=True):
            moment.add(output.float().cpu())
        for std, tokens in zip(stds, inputs, strict=True):
            std.add(tokens)
    blocks = encoder_blocks(encoder)
    depth = len(blocks) if blocks else len(moments)
    rows = []
    for place, moment in enumerate(moments):
        row = {"layer": float(depth - len(moments) + place + 1)}
        if stds:
            row |= {"std_before_norm": stds[place].value, "relative_std_before_norm": stds[place].relative}
        rows.append(nan_to_none(row | feature_metrics(moment)))
    return rows


def diagnose(
    encoder: FrozenEncoder,
    source: Source,
    *,
    images: int,
    image_size: tuple[int, int],
    seed: int,
    rule: MaskSection,
    views: int = 10,
    layers: bool = False,
) -> dict[str, Any]:
    """Diagnose an encoder without labels.

    Args:
        encoder: the encoder.
        source, images, image_size, seed: as in `measure_features`.
        rule: mask rule that draws the views of LiDAR.
        views: number of views of each image; 0: no LiDAR.
        layers: whether to add the metrics of all blocks as `layers`.

    Returns:
        The result of `measure_features` with `std_before_norm` and `lidar`, and `verdict`.

    Raises:
        UserError, RunError: as `measure_features` and `context_views`.
    """
    found, health = measure_features(encoder, source, images=images, image_size=image_size, seed=seed)
    chosen, count = choose(len(source), images, seed), len(encoder.vit.blocks) if layers else 1
    rows = per_layer_diagnostics(encoder, source, chosen, image_size, count)
    if views:
        seen = context_views(encoder, source, chosen, image_size, rule, views, seed, count)
        for row, block in zip(rows, seen, strict=True):
            row["lidar"] = lidar(block)
        found["data"]["views"] = views
    last = rows[-1]
    found["numbers"] |= {key: last[key] for key in ("std_before_norm", "lidar") if key in last}
    health = replace(health, std_before_norm=last.get("relative_std_before_norm"), lidar=last.get("lidar"))
    found["verdict"] = verdict(health)
    if layers:
        found["layers"] = rows
    return found
