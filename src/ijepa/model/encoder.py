"""The encoder as evaluation and export use it: images in, patch features out, without gradients, in eval mode."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from ijepa.model.config import ModelConfig
from ijepa.model.ijepa import PixelNorm, whole_images
from ijepa.model.init import init_weights
from ijepa.model.vision_transformer import VisionTransformer, patchify


class FrozenEncoder(nn.Module):
    """A Vision Transformer without gradients: (B, 3, H, W) -> (B, N, D).

    Pixels are uint8, which are normalized here, or floating-point, which must be normalized already (by ImageNet's mean
    and standard deviation). H and W are any multiples of the patch size; positions are interpolated to their grid.
    Features are float32, in any dtype that `compute_in` selects for the layers.

    Attributes:
        embed_dim: D.
        patch_size: side length of a patch in pixels.
        grid: rows and columns of patches at the native image size.
        precision: dtype in which linear layers and attention compute, see `compute_in`.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.pixel_norm = PixelNorm()
        self.embed_dim, self.patch_size, self.grid = vit.embed_dim, vit.patch_size, vit.grid
        self.precision = torch.float32
        self.eval()

    def compute_in(self, dtype: torch.dtype) -> Self:
        """Compute linear layers and attention in a dtype from now on, by autocast; float32 is without autocast."""
        self.precision = dtype
        return self

    @classmethod
    def initial(cls, config: ModelConfig, seed: int) -> Self:
        """Return the encoder before pretraining with this seed: the baseline for trained encoders."""
        vit = VisionTransformer(config)
        init_weights(vit, seed, prefix="encoder.", scheme=config.encoder.initial)
        return cls(vit)

    @torch.no_grad()
    def forward_blocks(self, pixels: Tensor, last: int = 1) -> list[Tensor]:
        """Return the outputs (B, N, D) of the last `last` blocks, earliest first, each after the final LayerNorm.

        Raises:
            ValueError: the patch size does not divide the image.
        """
        images, _, height, width = pixels.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not divide an image of {height} x {width}")
        patches = patchify(pixels, self.patch_size)  # (B * N, 3 * p * p)
        patches = patches if pixels.is_floating_point() else self.pixel_norm(patches)
        grid = (height // self.patch_size, width // self.patch_size)
        with self._autocast(patches.device):
            outputs = self.vit(patches, whole_images(patches, images), grid=grid, last=last)
        return [output.float().unflatten(0, (images, -1)) for output in outputs]  # (B * N, D) -> (B, N, D)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        # In float32 the autocast of the caller stays in effect: diagnostics during pretraining rely on it.
        return nullcontext() if self.precision == torch.float32 else torch.autocast(device.type, self.precision)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the output (B, N, D) of the last block, after the final LayerNorm."""
        return self.forward_blocks(pixels)[-1]
