"""The encoder once more as other programs run it: whole images, normalised pixels in, patch features out.

Packed sequences and buckets of lengths are for training; graphs that leave Python want plain tensors. Weights and
function are those of `VisionTransformer` at its native size, and `tests/interop` holds the two to each other.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ijepa.model.vision_transformer import NORM_EPS, Block, VisionTransformer


class DenseEncoder(nn.Module):
    """(B, 3, H, W) float32, normalised by ImageNet's mean and deviation, to (B, N, D), the final norm applied."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.patch_embed, self.norm = vit.patch_embed.proj, vit.norm
        self.blocks = nn.ModuleList(_Block(block) for block in vit.blocks)
        self.register_buffer("pos_embed", vit.pos_embed[None].clone())
        self.pos_embed: Tensor
        self.eval().requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        width = block.norm1.normalized_shape[0]
        self.heads = block.attn.heads
        # Our linear layers pad their rows; a graph has none to pad.
        self.qkv, self.proj = _plain(block.attn.qkv), _plain(block.attn.proj)
        self.fc1, self.fc2 = _plain(block.mlp.fc1), _plain(block.mlp.fc2)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.norm1.load_state_dict(block.norm1.state_dict())
        self.norm2.load_state_dict(block.norm2.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


def _plain(linear: nn.Linear) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(linear.in_features, linear.out_features)
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain
