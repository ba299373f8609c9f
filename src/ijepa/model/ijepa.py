"""I-JEPA: a context encoder and a predictor learn to predict the output of a target encoder, their moving average.

Assran et al., "Self-supervised learning from images with a joint-embedding predictive architecture", arXiv 2301.08243,
section 3. This file holds the method alone: tensors in, loss out. It contains no optimizer, no placement on devices and
no communication between ranks.

* The target encoder sees all patches, without stochastic depth, in eval mode, without gradients. Targets are its
  outputs after a LayerNorm without gain and offset (eps 1e-5).
* The loss is smooth-L1 (beta 1) in float32, mean over the patches and channels of a block, mean over the blocks of an
  image, and each image has the weight 1 / global batch. So the *sum* over micro-batches and ranks is the global mean.
* Skill = 1 - loss / (loss of predicting the mean target of each position). A model that has only learned the positions
  of patches has skill 0, whatever its loss.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa.masking.batch import Batch, Sequences
from ijepa.model.config import ModelConfig
from ijepa.model.init import init_weights
from ijepa.model.predictor import Predictor
from ijepa.model.vision_transformer import VisionTransformer, patchify

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TARGET_EPS = 1e-5


@dataclass(frozen=True)
class IJEPAOutput:
    """Results of one micro-batch. Each is a sum whose sum over the micro-batches is the value of the global batch.

    Attributes:
        loss: () float32 with gradient, the share of this micro-batch in the loss.
        baseline: () the same share for predicting the mean target of each position.
        target_sums: (3, D) float32: number (in every channel), sum and sum of squares of the target encoder's outputs
            over all tokens, before the LayerNorm.
        position_sums: (N, D) float32, sum of the normalized targets at each position.
    """

    loss: Tensor
    baseline: Tensor
    target_sums: Tensor
    position_sums: Tensor


def skill_of(loss: Tensor, baseline: Tensor) -> Tensor:
    """Return the skill () of a global batch, from its loss () and its baseline ()."""
    return 1 - loss / baseline


class IJEPA(nn.Module):
    """Both encoders, the predictor and the loss.

    Args:
        config: sizes; the `model` section of a recipe is one.
        seed: seed of the initial weights.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.context_encoder = VisionTransformer(config, config.encoder.drop_path)
        self.target_encoder = VisionTransformer(config).requires_grad_(False)
        self.predictor = Predictor(config)
        init_weights(self.context_encoder, seed, prefix="encoder.", scheme=config.encoder.initial)
        init_weights(self.predictor, seed, prefix="predictor.", scheme=config.predictor.initial)
        self.target_encoder.load_state_dict(self.context_encoder.state_dict())
        patches = config.grid[0] * config.grid[1]
        self.register_buffer("position_mean", torch.zeros(patches, config.encoder.width, device="cpu"))
        self.position_mean: Tensor
        self.pixel_norm = PixelNorm()
        self.train()

    def train(self, mode: bool = True) -> "IJEPA":
        """Set training mode; the target encoder always stays in eval mode."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(self, batch: Batch) -> IJEPAOutput:
        """Run one micro-batch of B images."""
        patches = patchify(batch.pixels, self.context_encoder.patch_size)  # (B * N, 3 * p * p) uint8
        output = self.encode_targets(patches, len(batch.context.lengths))  # (B * N, D)
        targets = layer_norm(output)
        visible = self.pixel_norm(patches.index_select(0, batch.context.index))  # (Tc, 3 * p * p)
        (context,) = self.context_encoder(visible, batch.context, drop_path_rows=batch.drop_path_rows)  # (Tc, D)
        prediction = upcast(self.predictor(context, batch))  # (Tt, D)
        wanted = targets.index_select(0, batch.targets.index)  # (Tt, D)
        # Flat patch numbers are image * N + position.
        mean = self.position_mean.index_select(0, batch.targets.index % len(self.position_mean))  # (Tt, D)
        with torch.no_grad():
            baseline = weighted_smooth_l1(mean, wanted, batch.loss_weight)
            flat = upcast(output)
            sums = torch.stack([torch.full_like(flat[0], len(flat)), flat.sum(0), flat.square().sum(0)])  # (3, D)
            by_position = targets.unflatten(0, (-1, len(self.position_mean))).sum(
                0
            )  # (B * N, D) -> (B, N, D) -> (N, D)
        return IJEPAOutput(weighted_smooth_l1(prediction, wanted, batch.loss_weight), baseline, sums, by_position)

    @torch.no_grad()
    def encode_targets(self, patches: Tensor, images: int) -> Tensor:
        """Return the target encoder's output (B * N, D), in its compute dtype, for uint8 patches (B * N, 3 * p * p)."""
        (output,) = self.target_encoder(self.pixel_norm(patches), whole_images(patches, images))
        return output


class PixelNorm(nn.Module):
    """Normalize uint8 patches, channels first, by ImageNet's mean and standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device="cpu")[:, :, None]  # (2, 3, 1)
        self.register_buffer("mean", 255 * mean, persistent=False)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.mean: Tensor
        self.scale: Tensor

    def forward(self, patches: Tensor) -> Tensor:
        """(T, 3 * p * p) uint8 -> float32."""
        channels = patches.unflatten(1, (3, -1)).to(self.mean.dtype)  # (T, 3, p * p)
        return ((channels - self.mean) * self.scale).flatten(1)


def whole_images(patches: Tensor, images: int) -> Sequences:
    """Return one sequence per image with all its patches, for patches (B * N, ...)."""
    each = len(patches) // images
    starts = torch.arange(0, len(patches) + 1, each, dtype=torch.int32, device=patches.device)
    return Sequences(torch.arange(len(patches), device=patches.device), starts, (each,) * images, each)


def upcast(x: Tensor) -> Tensor:
    """Return x in float32 if its dtype is narrower, else x."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(output: Tensor) -> Tensor:
    """Normalize (T, D) over the channels, without gain and offset, in float32."""
    return F.layer_norm(upcast(output), output.shape[-1:], eps=TARGET_EPS)


def weighted_smooth_l1(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return () the sum over tokens of weight (T,) times the mean over channels of smooth-L1 (beta 1) of (T, D)."""
    each = F.smooth_l1_loss(prediction, target, reduction="none").mean(1)  # (T,)
    # Not torch.dot, whose bits depend on the alignment of its operands in memory.
    return (each * weight.to(target.dtype)).sum()
