"""Diagnosis where a pooled last layer does not look: before the final LayerNorm, at every block, and between views.

A LayerNorm hides collapse: it stretches what deviation is left to a length of one. What goes into it is read by a hook
on the encoder's final norm, which is applied to every block that is asked for; so one pass over the images gives every
block's figures, with and without.

LiDAR (Thilak et al., arXiv 2312.04000) asks how many directions tell images apart when several views of each are seen:
the effective rank of the scatter between images measured by the scatter within. Views are contexts, as the
mask rule of pretraining draws them.
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
from ijepa.evaluation.diagnostics.metrics import Moments, defined, figures, measured, verdict
from ijepa.evaluation.features.extract import Encoder, Indices, device_of
from ijepa.evaluation.features.sampling import choose, crops
from ijepa.masking.batch import Sequences
from ijepa.masking.masks import draw_masks
from ijepa.model.encoder import FrozenEncoder
from ijepa.model.vision_transformer import patchify

LIDAR_DELTA, LIDAR_EPS = 1e-4, 1e-7

_BATCH = 64


def lidar(views: Tensor, delta: float = LIDAR_DELTA) -> float:
    """Return LiDAR of features (n, q, D) of q views of each of n images; at most min(n - 1, D)."""
    wide = views.double()
    centres = wide.mean(1)
    within = (wide - centres[:, None]).flatten(0, 1)
    between = centres - centres.mean(0)
    scatter = within.T @ within / len(within) + delta * torch.eye(wide.shape[2], dtype=wide.dtype)
    values, vectors = torch.linalg.eigh(scatter)
    # The eigenvalues of W^-1/2 B W^-1/2, B = between^T between / n, are squared singular values.
    p = torch.linalg.svdvals(between @ vectors / values.sqrt()).square()
    p = p / p.sum().clamp_min(torch.finfo(p.dtype).tiny) + LIDAR_EPS
    return float(torch.exp(-(p * p.log()).sum()))


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
    """Return the mean token (L, n, q, D) float32 of `views` contexts of each image, each context encoded by itself.

    L are the last `layers` blocks, earliest first, behind the final norm.

    Raises:
        UserError: a mask rule that the grid of this size leaves no room for.
        RunError: an image cannot be decoded.
    """
    grid = size[0] // encoder.patch_size, size[1] // encoder.patch_size
    rule.check_grid(grid)
    found = []
    for start in range(0, len(chosen), _BATCH):
        some = chosen[start : start + _BATCH]
        pixels = crops(source, some, size).to(device_of(encoder))
        patches = encoder.pixel_norm(patchify(pixels, encoder.patch_size))
        means = []
        for view in range(views):
            context = draw_masks(rule, grid, seed, some * views + view).context
            lengths = context.sum(1)
            rows = torch.from_numpy(np.flatnonzero(context)).to(patches.device)
            starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(patches.device)
            sequences = Sequences(rows, starts, tuple(lengths.tolist()))
            outputs = encoder.vit(patches[rows], sequences, grid=grid, last=layers)
            parts = [output.float().split(lengths.tolist()) for output in outputs]
            means.append(torch.stack([torch.stack([part.mean(0) for part in block]) for block in parts]))
        found.append(torch.stack(means, dim=2).cpu())
    return torch.cat(found, dim=1)


@contextmanager
def before_norm(norm: object) -> Iterator[list[Tensor]]:
    """Collect what goes into an encoder's final norm, (T, D) each call; nothing where it has none (None)."""
    seen: list[Tensor] = []
    if not isinstance(norm, nn.Module):
        yield seen
        return
    hook = norm.register_forward_pre_hook(lambda module, given: seen.append(given[0].float().cpu()))
    try:
        yield seen
    finally:
        hook.remove()


def norm_of(encoder: Encoder) -> object:
    """Return the final norm of an encoder, None where it has none."""
    return getattr(getattr(encoder, "vit", None), "norm", None)


class TokenStd:
    """Running standard deviation of every channel over all tokens, its mean over channels, and their size."""

    def __init__(self) -> None:
        self.count, self.sum, self.square = 0, torch.zeros(1), torch.zeros(1)

    def add(self, tokens: Tensor) -> None:
        """Take tokens (T, D) into account."""
        wide = tokens.double()
        self.count += len(wide)
        self.sum, self.square = self.sum + wide.sum(0), self.square + wide.square().sum(0)

    @property
    def value(self) -> float:
        """The figure; 0 of no tokens."""
        mean = self.sum / max(1, self.count)
        return float((self.square / max(1, self.count) - mean.square()).clamp_min(0).sqrt().mean())

    @property
    def relative(self) -> float:
        """The figure as a share of the tokens' root mean square; 0 of zeros."""
        size = float((self.square / max(1, self.count)).mean().sqrt())
        return self.value / size if size else 0.0


@torch.no_grad()
def layer_figures(
    encoder: Encoder, source: Source, chosen: Indices, size: tuple[int, int], layers: int
) -> list[dict[str, float | None]]:
    """Return figures of the last `layers` blocks, earliest first.

    Each has `layer` (counted from 1; the last block's number is the depth), `std_before_norm` and
    `relative_std_before_norm` (of each channel over all patches, where the encoder has a final norm), and
    `diagnostics.figures`.

    Raises:
        RunError: an image cannot be decoded, or features are not finite.
    """
    moments: list[Moments] = []
    stds: list[TokenStd] = []
    for start in range(0, len(chosen), _BATCH):
        pixels = crops(source, chosen[start : start + _BATCH], size).to(device_of(encoder))
        with before_norm(norm_of(encoder)) as raw:
            outputs = encoder.forward_blocks(pixels, layers)
        moments = moments or [Moments() for _ in outputs]
        stds = stds or [TokenStd() for _ in raw]
        for moment, output in zip(moments, outputs, strict=True):
            moment.add(output.float().cpu())
        for std, tokens in zip(stds, raw, strict=True):
            std.add(tokens)
    depth = depth_of(encoder) or len(moments)
    rows = []
    for place, moment in enumerate(moments):
        row = {"layer": float(depth - len(moments) + place + 1)}
        if stds:
            row |= {"std_before_norm": stds[place].value, "relative_std_before_norm": stds[place].relative}
        rows.append(defined(row | figures(moment)))
    return rows


def depth_of(encoder: Encoder) -> int | None:
    """Return how many blocks an encoder has, None where it does not tell."""
    blocks = getattr(getattr(encoder, "vit", None), "blocks", None)
    return None if blocks is None else len(blocks)


def diagnose_fully(
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
    """Return `diagnostics.diagnose` with `std_before_norm`, `lidar` of `views` contexts (0: none), and `layers`.

    The verdict has seen all of them. `layers` is a list of `layer_figures` and `lidar` of every block, there only if
    asked for. Raises as `diagnose`.
    """
    found, health = measured(encoder, source, images=images, image_size=image_size, seed=seed)
    chosen, count = choose(len(source), images, seed), len(encoder.vit.blocks) if layers else 1
    rows = layer_figures(encoder, source, chosen, image_size, count)
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
