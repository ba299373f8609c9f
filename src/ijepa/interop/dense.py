"""The encoder in a form that other programs run: whole images in, patch features out.

Packed sequences serve training; exported graphs need plain tensors. Weights and function are those of
`VisionTransformer` at its native size; `tests/unit/interop/test_dense.py` compares the two.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ijepa.model.vision_transformer import NORM_EPS, Block, VisionTransformer


class DenseEncoder(nn.Module):
    """An encoder of normalized images: (B, 3, H, W) float32 -> (B, N, D), after the final norm."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.patch_embed, self.norm = vit.patch_embed.proj, vit.norm
        self.blocks = nn.ModuleList(_Block(block) for block in vit.blocks)
        self.register_buffer("pos_embed", vit.pos_embed[None].clone())
        self.pos_embed: Tensor
        self.eval().requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the features (B, N, D) of images (B, 3, H, W)."""
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, N, D)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        width = block.norm1.normalized_shape[0]
        self.heads = block.attn.heads
        # Our linear layers pad the rows of packed sequences; a graph has no packed sequences.
        self.qkv, self.proj = _plain(block.attn.qkv), _plain(block.attn.proj)
        self.fc1, self.fc2 = _plain(block.mlp.fc1), _plain(block.mlp.fc2)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.norm1.load_state_dict(block.norm1.state_dict())
        self.norm2.load_state_dict(block.norm2.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))  # (B, N, 3 D) -> (B, N, 3, H, D / H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D / H) each
        x = x + self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


def _plain(linear: nn.Linear) -> nn.Linear:
    with torch.device("meta"):  # the weights are shared, so that none are allocated
        plain = nn.Linear(linear.in_features, linear.out_features)
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain
