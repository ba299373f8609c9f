"""The predictor: a narrow Vision Transformer that predicts the representations of a target block from the context.

It runs once per target block (arXiv 2301.08243, section 3). Context tokens attend to the queries of the block, so their
representations differ from block to block and the runs cannot be shared. Two exact savings are taken. The projection of
the context, with the norm and qkv of the first layer, is the same for all blocks of an image, so it is computed once.
Only the outputs of the queries are used, so the last layer computes no others.
"""

import torch
from torch import Tensor, nn

from ijepa.masking.batch import Batch
from ijepa.model.config import ModelConfig
from ijepa.model.linear import Linear, pad_to_multiple
from ijepa.model.vision_transformer import NORM_EPS, Block, sincos_positions


class Predictor(nn.Module):
    """Predict target representations (Tt, D) from context representations (Tc, D); d wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        predictor, width = config.predictor, config.predictor.width
        self.predictor_embed = Linear(config.encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_blocks: list[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(width, predictor.heads, round(width * predictor.mlp_ratio)) for _ in range(predictor.depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predictor_proj = Linear(width, config.encoder.width)
        positions = predictor.position_scale * sincos_positions(width, config.grid, config.position_grid)
        self.register_buffer("predictor_pos_embed", positions, persistent=False)
        self.predictor_pos_embed: Tensor

    def forward(self, context: Tensor, batch: Batch) -> Tensor:
        """Return predictions (Tt, D), given the context encoder's output (Tc, D) and the sequences of the batch."""
        table = self.predictor_pos_embed  # (N, d)
        sequences, queries = batch.predictor, batch.queries
        seen = self.predictor_embed(pad_to_multiple(context))[: len(context)]  # (Tc, d)
        seen = seen.to(table.dtype) + table.index_select(0, batch.context.index % len(table))
        asked = self.mask_token[0] + table.index_select(0, batch.targets.index % len(table))  # (Tt, d)
        tokens = pad_to_multiple(torch.cat([seen, asked]))  # (Tc + Tt, d), each token once
        index, query_rows = pad_to_multiple(sequences.index), pad_to_multiple(queries.index)  # (Tp,), (Tt,)

        first, final = self.predictor_blocks[0], self.predictor_blocks[-1]
        # The gathers repeat the context tokens of an image for each of its blocks, after the shared work.
        qkv = first.qkv(tokens).index_select(0, index)  # (Tp, 3 * d)
        x = tokens.index_select(0, index)  # (Tp, d)
        if first is not final:
            x = first.attend_and_mlp(x, qkv, sequences, sequences)
            for block in self.predictor_blocks[1:-1]:
                x = block(x, sequences)
            qkv = final.qkv(x)
        x = final.attend_and_mlp(x.index_select(0, query_rows), qkv, queries, sequences, query_rows)  # (Tt, d)
        return self.predictor_proj(self.predictor_norm(x))[: len(queries.index)]
