"""The predictor: a narrow Vision Transformer that guesses a target block's representations from the context's.

It runs once for each target block (arXiv 2301.08243, section 3): context tokens attend to that block's queries, so
their representations differ from block to block, and the four runs cannot be shared. Two savings are exact and
taken: the projection of the context, with the first layer's norm and qkv, is the same for every block of an image
and computed once; and in the last layer only the queries' outputs are ever read, so only they are computed.
"""

import torch
from torch import Tensor, nn

from ijepa.masking.batch import Batch
from ijepa.model.linear import Linear, pad_rows
from ijepa.model.vision_transformer import NORM_EPS, Block, sincos_positions


class Predictor(nn.Module):
    """Predict target representations (Tt, D) from context representations (Tc, D); d wide inside.

    Args:
        grid: native rows and columns of patches.
        encoder_width: D.
        width: d.
        depth: number of layers.
        heads: attention heads; must divide `width`.
        mlp_ratio: hidden width of the MLP over d.
        position_scale: factor on the sin-cos positions.
        position_grid: rows and columns that positions are stretched over, if not the native ones.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        position_scale: float = 1.0,
        position_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.predictor_embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_blocks: list[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(width, heads, round(width * mlp_ratio)) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predictor_proj = Linear(width, encoder_width)
        positions = position_scale * sincos_positions(width, grid, position_grid)
        self.register_buffer("predictor_pos_embed", positions, persistent=False)
        self.predictor_pos_embed: Tensor

    def forward(self, context: Tensor, batch: Batch) -> Tensor:
        """Return predictions (Tt, D), given the context encoder's output (Tc, D) and the batch's sequences."""
        table = self.predictor_pos_embed
        sequences, queries = batch.predictor, batch.queries
        seen = self.predictor_embed(pad_rows(context))[: len(context)]
        seen = seen.to(table.dtype) + table.index_select(0, batch.context.index % len(table))
        asked = self.mask_token[0] + table.index_select(0, batch.targets.index % len(table))
        tokens = pad_rows(torch.cat([seen, asked]))  # (Tc + Tt, d): what predictor sequences are put together from
        index, asking = pad_rows(sequences.index), pad_rows(queries.index)

        first, final = self.predictor_blocks[0], self.predictor_blocks[-1]
        qkv = first.project(tokens).index_select(0, index)
        x = tokens.index_select(0, index)
        if first is not final:
            x = first.finish(x, qkv, sequences, sequences)
            for block in self.predictor_blocks[1:-1]:
                x = block(x, sequences)
            qkv = final.project(x)
        x = final.finish(x.index_select(0, asking), qkv, queries, sequences, asking)
        return self.predictor_proj(self.predictor_norm(x))[: len(queries.index)]
