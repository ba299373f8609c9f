"""A Vision Transformer over packed sequences of patches (Dosovitskiy et al., arXiv 2010.11929), without a class token.

It is the encoder of I-JEPA (arXiv 2301.08243, A.1): pre-norm blocks, LayerNorm with eps 1e-6, qkv with bias, exact
GELU, fixed two-dimensional sin-cos positions, and a final LayerNorm. Only the patches in the sequences are embedded,
and a layer that stochastic depth drops for an image is not computed for it.

Parameter names follow timm and the original code (`patch_embed.proj`, `blocks.0.attn.qkv`, `norm`), so most weights can
be exchanged under the same name.

Shapes: T tokens of all sequences, D wide; H heads of width d; N patches per image; p x p pixels per patch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa.masking.batch import Sequences
from ijepa.masking.packing import layer_rates
from ijepa.model.attention import Backend, attention
from ijepa.model.config import ModelConfig
from ijepa.model.linear import Linear, linear, pad_to_multiple

NORM_EPS = 1e-6


class Attention(nn.Module):
    """The two linear layers of multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.backend: Backend = "auto"

    def forward(self, qkv: Tensor, queries: Sequences, keys: Sequences, rows: Tensor | None = None) -> Tensor:
        """Attend, given the output (T, 3 * D) of `self.qkv`; only for the queries in `rows` (Tq,) if given."""
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (T, 3 * D) -> (T, 3, H, d)
        return self.proj(attention(qkv, queries, keys, rows, self.backend).flatten(1))  # (Tq, H, d) -> (Tq, D)


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
        return self.attend_and_mlp(x, self.qkv(x), sequences, sequences, None, scale)

    def qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values (T, 3 * D) of tokens (T, D). Sequences that share a token can share them."""
        return self.attn.qkv(self.norm1(x))

    def attend_and_mlp(
        self,
        x: Tensor,
        qkv: Tensor,
        queries: Sequences,
        keys: Sequences,
        rows: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Return the output of the layer, given `qkv` (T, 3 * D); x (Tq, D) are all its tokens or those in `rows`."""
        x = _residual(x, self.attn(qkv, queries, keys, rows), scale)
        return _residual(x, self.mlp(self.norm2(x)), scale)


def _residual(x: Tensor, branch: Tensor, scale: float | Tensor) -> Tensor:
    """Return x + scale * branch, in x's dtype."""
    if isinstance(scale, Tensor):  # a compiled block takes its scale as a tensor, so that one graph serves all layers
        return x + scale * branch.to(x.dtype)
    return torch.add(x, branch, alpha=scale)


class PatchEmbedding(nn.Module):
    """The strided convolution of a Vision Transformer, computed for chosen patches only."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(T, 3 * p * p), channels first -> (T, D)."""
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (D, 3, p, p) -> (D, 3 * p * p)


class VisionTransformer(nn.Module):
    """The encoder: patches of images in, one token (D,) per patch out. Weights are left as torch creates them.

    Args:
        config: the model whose encoder this is. Only positions depend on the image size.
        drop_path: stochastic depth rate of the last layer; rates rise linearly from 0.
    """

    def __init__(self, config: ModelConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        encoder, width = config.encoder, config.encoder.width
        self.patch_size, self.embed_dim, self.grid = config.patch_size, width, config.grid
        self.patch_embed = PatchEmbedding(config.patch_size, width)
        self.blocks: list[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(width, encoder.heads, round(width * encoder.mlp_ratio)) for _ in range(encoder.depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.keep_rates = [1 - rate for rate in layer_rates(encoder.depth, drop_path)]
        self.position_scale, self._position_grid = encoder.position_scale, config.position_grid or self.grid
        self.register_buffer("pos_embed", self.positions(self.grid), persistent=False)
        self.pos_embed: Tensor

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return positions (N, D) for a grid of patches, interpolated from the grid that positions were made for."""
        return self.position_scale * sincos_positions(self.embed_dim, grid, self._position_grid)

    def embed(self, patches: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embed normalized patches (T, 3 * p * p) with the flat patch numbers `index` (T,): (T, D)."""
        table = self.pos_embed if grid == self.grid else self.positions(grid).to(self.pos_embed)
        return self.patch_embed(patches).to(table.dtype) + table.index_select(0, index % table.shape[0])

    def forward(
        self,
        patches: Tensor,
        sequences: Sequences,
        *,
        grid: tuple[int, int] | None = None,
        drop_path_rows: Sequence[Sequences | None] = (),
        last: int = 1,
    ) -> list[Tensor]:
        """Encode packed sequences of patches.

        Args:
            patches: (T, 3 * p * p) normalized pixels of the patches, channels first within a patch.
            sequences: one sequence per image; `index` (T,) are the flat patch numbers.
            grid: rows and columns of patches in the images, if not those of the config.
            drop_path_rows: for each layer, the tokens of the images that it is computed for; None or empty for all.
            last: number of last layers whose outputs are returned.

        Returns:
            `last` tensors (T, D), earliest layer first, each after the final LayerNorm.
        """
        tokens, index = len(patches), sequences.index
        if len(set(sequences.lengths)) > 1:  # with equal lengths the number of tokens is the same at every step
            patches, index = pad_to_multiple(patches), pad_to_multiple(index)
        x = self.embed(patches, index, grid or self.grid)
        # Padding starts at zero, so that its values in later layers depend on the weights and not on the images. There
        # padding can still set a float8 scale over all tokens. That costs range but no precision, and float8 has enough
        # range. Zeroing padding before each layer would cost several passes over the tokens.
        if sequences.real is not None:
            x = x.masked_fill(~pad_to_multiple(sequences.real)[: len(x), None], 0)
        outputs = []
        for layer, block in enumerate(self.blocks):
            rows = drop_path_rows[layer] if drop_path_rows else None
            # The residual branches of kept images are scaled up, so that their expectation is that without dropping.
            scale = 1 / self.keep_rates[layer] if drop_path_rows else 1.0
            x = block(x, sequences, scale) if rows is None else _run_for_rows(block, x, sequences, rows, scale, tokens)
            if layer >= len(self.blocks) - last:
                outputs.append(self.norm(x[:tokens]))
        return outputs


def _run_for_rows(block: Block, x: Tensor, sequences: Sequences, rows: Sequences, scale: float, tokens: int) -> Tensor:
    """Return x (T, D) with the tokens `rows` replaced by their output of `block`; the first `tokens` are not padding.

    A layer that no image keeps still runs, on padding or else on one image whose result is not used. Its gradient is
    then zero instead of missing, for any number of images in a micro-batch.
    """
    run = rows if len(rows.index) else _first_of(sequences)
    if rows.real is not None:  # the padding of the layer is the last row; no gradient passes through padding
        x.detach()[tokens - 1].zero_()
    output = block(x.index_select(0, pad_to_multiple(run.index)), run, scale)
    return x.index_copy(0, rows.index, output[: len(rows.index)])


def _first_of(sequences: Sequences) -> Sequences:
    """Return the first of the packed sequences."""
    length = sequences.lengths[0]
    return Sequences(torch.arange(length, device=sequences.index.device), sequences.cu_seqlens[:2], (length,))


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B * N, C * p * p), row by row, channels first within a patch."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixels.reshape(batch, channels, rows, patch_size, columns, patch_size)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (B, C, rows, p, columns, p) -> (B, rows, columns, C, p, p)
    return x.reshape(batch * rows * columns, channels * patch_size * patch_size)


def sincos_positions(width: int, grid: tuple[int, int], native: tuple[int, int] | None = None) -> Tensor:
    """Return two-dimensional sin-cos positions (N, width), float32, row by row (MAE, arXiv 2111.06377, A.1).

    The first half of the channels encodes the column, the second half the row. Each half holds sines, then cosines, at
    frequencies 10000^(-i / (width / 4)). On a grid other than `native`, the centers of the patches are scaled to the
    native grid, so that the same place in the image has the same position.
    """

    def encode(size: int, whole: int) -> Tensor:
        """Return (size, width / 2)."""
        coordinate = (torch.arange(size, dtype=torch.float64) + 0.5) * whole / size - 0.5
        angle = coordinate[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    with torch.device("cpu"):  # a constant, which needs values even if weights are created on the meta device
        frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        by_row, by_column = (encode(size, whole) for size, whole in zip(grid, native or grid, strict=True))
        by_row = by_row.repeat_interleave(grid[1], 0)  # (rows, width / 2) -> (N, width / 2): 0 0 0 1 1 1
        by_column = by_column.repeat(grid[0], 1)  # (columns, width / 2) -> (N, width / 2): 0 1 2 0 1 2
        return torch.cat([by_column, by_row], dim=1).float()
