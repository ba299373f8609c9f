"""I-JEPA: a context encoder and a predictor that learn to predict a target encoder, their moving average.

Assran et al., "Self-supervised learning from images with a joint-embedding predictive architecture", arXiv
2301.08243, section 3. This file is the method and nothing else: tensors in, loss out. It knows no optimiser, no
device placement and no other rank.

* The target encoder sees all patches, without stochastic depth, in eval mode, without gradients. Targets are its
  outputs, layer-normalised without affine (eps 1e-5).
* The loss is smooth-L1 (beta 1) in float32, mean over a block's patches and channels, mean over an image's blocks,
  each image weighing 1 / global batch: a *sum* over micro-batches and ranks is the global mean.
* `skill` = 1 - loss / (loss of predicting each position's mean target). A model that has only learned where a patch
  lies scores 0, whatever its loss.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa.masking.batch import Batch, Sequences
from ijepa.model.init import Scheme, initialize
from ijepa.model.predictor import Predictor
from ijepa.model.vision_transformer import VisionTransformer, patchify

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TARGET_EPS = 1e-5


class EncoderShape(Protocol):
    """What the encoders are built from."""

    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def depth(self) -> int: ...  # noqa: D102
    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def mlp_ratio(self) -> float: ...  # noqa: D102
    @property
    def drop_path(self) -> float: ...  # noqa: D102
    @property
    def position_scale(self) -> float: ...  # noqa: D102
    @property
    def initial(self) -> Scheme: ...  # noqa: D102


class PredictorShape(Protocol):
    """What the predictor is built from."""

    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def depth(self) -> int: ...  # noqa: D102
    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def mlp_ratio(self) -> float: ...  # noqa: D102
    @property
    def position_scale(self) -> float: ...  # noqa: D102
    @property
    def initial(self) -> Scheme: ...  # noqa: D102


class ModelShape(Protocol):
    """What an `IJEPA` is built from: the `model` section of a recipe, or anything of its form."""

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        ...

    @property
    def patch_size(self) -> int: ...  # noqa: D102
    @property
    def position_grid(self) -> tuple[int, int] | None:
        """Rows and columns that positions are stretched over, if not those of the images."""
        ...

    @property
    def encoder(self) -> EncoderShape: ...  # noqa: D102
    @property
    def predictor(self) -> PredictorShape: ...  # noqa: D102


@dataclass(frozen=True)
class IJEPAOutput:
    """What one micro-batch says. All values are sums whose sum over a global batch is the batch's figure.

    Attributes:
        loss: () float32 with gradient; this micro-batch's share of the loss.
        baseline: () the same share for predicting each position's mean target.
        target_sums: (3, D) float32: count (in every channel), sum and sum of squares of the target encoder's
            output, over all its tokens, before their layer norm.
        position_sums: (N, D) float32, sum of the layer-normalised targets at each position.
    """

    loss: Tensor
    baseline: Tensor
    target_sums: Tensor
    position_sums: Tensor


def skill_of(loss: Tensor, baseline: Tensor) -> Tensor:
    """Skill () of a global batch, from its loss () and its baseline ()."""
    return 1 - loss / baseline


class IJEPA(nn.Module):
    """Both encoders, the predictor and the loss. `seed` draws the initial weights, name by name."""

    def __init__(self, shape: ModelShape, seed: int = 0) -> None:
        super().__init__()
        self.context_encoder = build_encoder(shape, drop_path=shape.encoder.drop_path)
        self.target_encoder = build_encoder(shape).requires_grad_(False)
        self.predictor = Predictor(
            grid=self.context_encoder.grid,
            encoder_width=shape.encoder.width,
            width=shape.predictor.width,
            depth=shape.predictor.depth,
            heads=shape.predictor.heads,
            mlp_ratio=shape.predictor.mlp_ratio,
            position_scale=shape.predictor.position_scale,
            position_grid=shape.position_grid,
        )
        initialize(self.context_encoder, seed, prefix="encoder.", scheme=shape.encoder.initial)
        initialize(self.predictor, seed, prefix="predictor.", scheme=shape.predictor.initial)
        self.target_encoder.load_state_dict(self.context_encoder.state_dict())
        patches = self.context_encoder.grid[0] * self.context_encoder.grid[1]
        self.register_buffer("position_mean", torch.zeros(patches, shape.encoder.width, device="cpu"))
        self.position_mean: Tensor
        self.pixel_norm = PixelNorm()
        self.train()

    def train(self, mode: bool = True) -> "IJEPA":
        """Set training mode; the target encoder always stays in eval mode."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(self, batch: Batch) -> IJEPAOutput:
        """Run one micro-batch; see `IJEPAOutput`."""
        patches = patchify(batch.pixels, self.context_encoder.patch_size)  # (B * N, 3 p p), uint8
        output = self.encode_targets(patches, len(batch.context.lengths))
        targets = layer_norm(output)
        seen = self.pixel_norm(patches.index_select(0, batch.context.index))
        (context,) = self.context_encoder(seen, batch.context, kept=batch.kept)
        prediction = upcast(self.predictor(context, batch))
        wanted = targets.index_select(0, batch.targets.index)
        mean = self.position_mean.index_select(0, batch.targets.index % len(self.position_mean))
        with torch.no_grad():
            baseline = weighted_smooth_l1(mean, wanted, batch.loss_weight)
            flat = upcast(output)
            sums = torch.stack([torch.full_like(flat[0], len(flat)), flat.sum(0), flat.square().sum(0)])
            by_position = targets.unflatten(0, (-1, len(self.position_mean))).sum(0)
        return IJEPAOutput(weighted_smooth_l1(prediction, wanted, batch.loss_weight), baseline, sums, by_position)

    @torch.no_grad()
    def encode_targets(self, patches: Tensor, images: int) -> Tensor:
        """Target encoder's output (B * N, D), in its compute dtype, for uint8 patches (B * N, 3 p p)."""
        (output,) = self.target_encoder(self.pixel_norm(patches), whole_images(patches, images))
        return output


class PixelNorm(nn.Module):
    """uint8 patches (T, 3 * p * p), channel first, to float32 with ImageNet's mean and standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device="cpu")[:, :, None]
        self.register_buffer("mean", 255 * mean, persistent=False)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.mean: Tensor
        self.scale: Tensor

    def forward(self, patches: Tensor) -> Tensor:
        """(T, 3 * p * p) uint8 -> float32."""
        return ((patches.unflatten(1, (3, -1)).to(self.mean.dtype) - self.mean) * self.scale).flatten(1)


def build_encoder(shape: ModelShape, drop_path: float = 0.0) -> VisionTransformer:
    """Build one encoder; weights are left as torch makes them."""
    encoder = shape.encoder
    return VisionTransformer(
        image_size=shape.image_hw,
        patch_size=shape.patch_size,
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads,
        mlp_ratio=encoder.mlp_ratio,
        drop_path=drop_path,
        position_scale=encoder.position_scale,
        position_grid=shape.position_grid,
    )


def whole_images(patches: Tensor, images: int) -> Sequences:
    """Sequences that hold every patch of every image: patches (B * N, ...)."""
    each = len(patches) // images
    starts = torch.arange(0, len(patches) + 1, each, dtype=torch.int32, device=patches.device)
    return Sequences(torch.arange(len(patches), device=patches.device), starts, (each,) * images, each)


def upcast(x: Tensor) -> Tensor:
    """Return x in float32 where it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(output: Tensor) -> Tensor:
    """Layer-normalise (T, D) without affine, in float32."""
    return F.layer_norm(upcast(output), output.shape[-1:], eps=TARGET_EPS)


def weighted_smooth_l1(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the sum over tokens of weight (T,) times the channel mean of smooth-L1 (beta 1): ().

    The bits of `torch.dot` depend on where its operands lie in memory; those of torch's own `sum` do not.
    """
    return (F.smooth_l1_loss(prediction, target, reduction="none").mean(1) * weight.to(target.dtype)).sum()
