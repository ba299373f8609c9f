"""An encoder as everyone but pretraining uses it: images in, patch features out, frozen, in eval mode."""

from typing import Self

import torch
from torch import Tensor, nn

from ijepa.model.initial import initialize
from ijepa.model.jepa import ModelShape, PixelNorm, build_encoder, whole_images
from ijepa.model.vision_transformer import VisionTransformer, patchify


class Encoder(nn.Module):
    """A Vision Transformer without gradients: (B, 3, H, W) -> (B, N, D).

    `pixels` are uint8, normalised inside, or floating-point, taken as normalised already (ImageNet's mean and
    deviation). H and W are any multiples of the patch; positions are stretched over another grid than the native.

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
        self.eval()

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
        outputs = self.vit(patches, whole_images(patches, images), grid=grid, last=last)
        return [output.float().unflatten(0, (images, -1)) for output in outputs]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the last block's output (B, N, D), the final norm applied."""
        return self.forward_blocks(pixels)[-1]
