"""An encoder as everyone but pretraining uses it: images in, patch features out, frozen, in eval mode."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from ijepa.model.ijepa import ModelShape, PixelNorm, build_encoder, whole_images
from ijepa.model.init import initialize
from ijepa.model.vision_transformer import VisionTransformer, patchify


class Encoder(nn.Module):
    """A Vision Transformer without gradients: (B, 3, H, W) -> (B, N, D).

    `pixels` are uint8, normalised inside, or floating-point, taken as normalised already (ImageNet's mean and
    deviation). H and W are any multiples of the patch; positions are stretched over another grid than the native.
    Features are float32, in whatever dtype `compute_in` lets the layers compute.

    Attributes:
        embed_dim: D.
        patch_size: side of a patch in pixels.
        grid: rows and columns of patches at the native image size.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.pixel_norm = PixelNorm()
        self.embed_dim, self.patch_size, self.grid = vit.embed_dim, vit.patch_size, vit.grid
        self._dtype = torch.float32
        self.eval()

    @property
    def precision(self) -> torch.dtype:
        """What linear layers and attention compute in."""
        return self._dtype

    def compute_in(self, dtype: torch.dtype) -> Self:
        """Let linear layers and attention compute in a dtype by autocast from now on; float32 is without autocast."""
        self._dtype = dtype
        return self

    @classmethod
    def initial(cls, shape: ModelShape, seed: int) -> Self:
        """Return the encoder as pretraining with this seed starts it: the baseline beside every trained one."""
        vit = build_encoder(shape)
        initialize(vit, seed, prefix="encoder.", scheme=shape.encoder.initial)
        return cls(vit)

    @torch.no_grad()
    def forward_blocks(self, pixels: Tensor, last: int = 1) -> list[Tensor]:
        """Return the outputs of the last `last` blocks, earliest first, the final norm applied: (B, N, D) each.

        Raises:
            ValueError: where the patch does not divide the image.
        """
        images, _, height, width = pixels.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not divide an image of {height} x {width}")
        patches = patchify(pixels, self.patch_size)
        patches = patches if pixels.is_floating_point() else self.pixel_norm(patches)
        grid = (height // self.patch_size, width // self.patch_size)
        with self._autocast(patches.device):
            outputs = self.vit(patches, whole_images(patches, images), grid=grid, last=last)
        return [output.float().unflatten(0, (images, -1)) for output in outputs]

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        # Without a dtype of its own, the caller's autocast stays: pretraining measures its encoder on the way.
        return nullcontext() if self._dtype == torch.float32 else torch.autocast(device.type, self._dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the last block's output (B, N, D), the final norm applied."""
        return self.forward_blocks(pixels)[-1]
