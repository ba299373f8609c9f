"""A Vision Transformer over packed sequences of patches (Dosovitskiy et al., arXiv 2010.11929), without a CLS token.

Pre-norm blocks, LayerNorm eps 1e-6, qkv bias, exact GELU, fixed two-dimensional sin-cos positions, final LayerNorm:
the encoder of I-JEPA (arXiv 2301.08243, A.1). Only the patches that a sequence asks for are embedded, and layers
that stochastic depth drops for an image are not computed for it.

Parameter names follow timm and the original code (`patch_embed.proj`, `blocks.0.attn.qkv`, `norm`), so that
exchanging weights is mostly the identity.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa.masking.batch import Sequences
from ijepa.model.attention import Backend, attention
from ijepa.model.linear import Linear, linear, pad_rows

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention's two linear layers; D wide, H heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.backend: Backend = "auto"

    def forward(self, qkv: Tensor, queries: Sequences, keys: Sequences, rows: Tensor | None = None) -> Tensor:
        """Attend, given the output (T, 3D) of `qkv`; only the queries in `rows` (Tq,) are answered, if given."""
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (T, 3, H, d)
        return self.proj(attention(qkv, queries, keys, rows, self.backend).flatten(1))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, sequences: Sequences, scale: float | Tensor = 1.0) -> Tensor:
        """(T, D) -> (T, D); `scale` multiplies both residual branches."""
        return self.finish(x, self.project(x), sequences, sequences, None, scale)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values (T, 3D) of tokens (T, D): what can be shared between sequences."""
        return self.attn.qkv(self.norm1(x))

    def finish(
        self,
        x: Tensor,
        qkv: Tensor,
        queries: Sequences,
        keys: Sequences,
        rows: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The layer's output for tokens x (Tq, D), which are all or the `rows` (Tq,) of those in qkv (T, 3D)."""
        x = residual(x, self.attn(qkv, queries, keys, rows), scale)
        return residual(x, self.mlp(self.norm2(x)), scale)


def residual(x: Tensor, branch: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return x + scale * branch, in x's dtype."""
    if isinstance(scale, Tensor):
        return x + scale * branch.to(x.dtype)
    return torch.add(x, branch, alpha=scale)


class PatchEmbedding(nn.Module):
    """Patches (T, 3 * p * p), channel first, to tokens (T, D): the strided convolution, at chosen patches only."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(T, 3 * p * p) -> (T, D)."""
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """The encoder: patches of images in, one D-wide token for each out.

    Args:
        image_size: native height and width in pixels; only positions depend on it.
        patch_size: side of a patch in pixels.
        width: D.
        depth: number of layers.
        heads: attention heads; must divide `width`.
        mlp_ratio: hidden width of the MLP over D.
        drop_path: stochastic depth's rate at the last layer; rates rise linearly from 0.
        position_scale: factor on the sin-cos positions; 1 in the paper.
        position_grid: rows and columns that positions are stretched over, if not the native ones.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        position_scale: float = 1.0,
        position_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, width
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_embed = PatchEmbedding(patch_size, width)
        self.blocks: list[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(width, heads, round(width * mlp_ratio)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.keep_rates = [1 - drop_path * layer / max(depth - 1, 1) for layer in range(depth)]
        self.position_scale, self._position_grid = position_scale, position_grid or self.grid
        self.register_buffer("pos_embed", self.positions(self.grid), persistent=False)
        self.pos_embed: Tensor

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions (N, D) for a grid of patches, stretched over the grid that positions were made for."""
        return self.position_scale * sincos_positions(self.embed_dim, grid, self._position_grid)

    def embed(self, patches: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embed normalised patches (T, 3 * p * p) that lie at flat patch numbers `index` (T,): (T, D)."""
        table = self.pos_embed if grid == self.grid else self.positions(grid).to(self.pos_embed)
        return self.patch_embed(patches).to(table.dtype) + table.index_select(0, index % table.shape[0])

    def forward(
        self,
        patches: Tensor,
        sequences: Sequences,
        *,
        grid: tuple[int, int] | None = None,
        kept: Sequence[Sequences | None] = (),
        last: int = 1,
    ) -> list[Tensor]:
        """Encode packed sequences of patches.

        Args:
            patches: (T, 3 * p * p) normalised pixels of the tokens' patches, channel first within a patch.
            sequences: `index` (T,) are the tokens' flat patch numbers; one sequence an image.
            grid: rows and columns of patches in the images, if not the native ones.
            kept: for each layer, the tokens of the images it is computed for; None or empty for all.
            last: how many of the last layers' outputs to return.

        Returns:
            `last` tensors (T, D), earliest layer first, the final LayerNorm applied to each.
        """
        tokens, index = len(patches), sequences.index
        if len(set(sequences.lengths)) > 1:  # else the number of tokens is the same at every step
            patches, index = pad_rows(patches), pad_rows(index)
        x = self.embed(patches, index, grid or self.grid)
        # Padding starts at zero, so its later values depend on the weights and not on the images. In later linear
        # layers padding can still set a float8 scale over all tokens. That costs range but no precision, and float8
        # has enough range. To zero padding before each layer would cost several passes over the tokens.
        if sequences.real is not None:
            x = x.masked_fill(~pad_rows(sequences.real)[: len(x), None], 0)
        outputs = []
        for layer, block in enumerate(self.blocks):
            chosen = kept[layer] if kept else None
            scale = 1 / self.keep_rates[layer] if kept else 1.0
            if chosen is None:
                x = block(x, sequences, scale)
            else:
                # A layer that no image keeps still runs, on padding or else on one image and for nothing: its gradient
                # is then zero and not missing, whatever the number of images in a micro-batch.
                run = chosen if len(chosen.index) else first_of(sequences)
                if chosen.real is not None:  # the layer's padding is the last row; no gradient passes through padding
                    x.detach()[tokens - 1].zero_()
                some = block(x.index_select(0, pad_rows(run.index)), run, scale)
                x = x.index_copy(0, chosen.index, some[: len(chosen.index)])
            if layer >= len(self.blocks) - last:
                outputs.append(self.norm(x[:tokens]))
        return outputs


def first_of(sequences: Sequences) -> Sequences:
    """Return the first of some packed sequences, as rows of their tokens."""
    long = sequences.lengths[0]
    return Sequences(torch.arange(long, device=sequences.index.device), sequences.cu_seqlens[:2], (long,))


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B * N, C * p * p), row by row, channel first within a patch."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixels.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch * rows * columns, channels * patch_size * patch_size)


def sincos_positions(width: int, grid: tuple[int, int], native: tuple[int, int] | None = None) -> Tensor:
    """Two-dimensional sin-cos positions (N, width), float32, rows of patches first (MAE, arXiv 2111.06377, A.1).

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines, at
    frequencies 10000^(-i / (width / 4)). On a grid other than `native`, patch centres are stretched over the
    native grid, so that the same place in the image keeps the same position.
    """
    with torch.device("cpu"):  # a constant: it has values even where weights are built on the meta device
        return _sincos(width, grid, native or grid)


def _sincos(width: int, grid: tuple[int, int], native: tuple[int, int]) -> Tensor:
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = (
        ((torch.arange(size, dtype=torch.float64) + 0.5) * whole / size - 0.5)
        for size, whole in zip(grid, native, strict=True)
    )

    def encode(coordinate: Tensor) -> Tensor:
        angle = coordinate[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    by_column = encode(columns).repeat(grid[0], 1)
    by_row = encode(rows).repeat_interleave(grid[1], 0)
    return torch.cat([by_column, by_row], dim=1).float()
