"""What a model is built from: plain values, which the caller has checked."""

from dataclasses import dataclass
from typing import Literal

InitScheme = Literal["normal", "xavier"]


@dataclass(frozen=True)
class EncoderConfig:
    """The encoders.

    Attributes:
        width: embedding dimension; a multiple of 4 (for the sin-cos positions) and of `heads`.
        depth: number of transformer blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP over `width`.
        drop_path: stochastic depth rate of the last block of the context encoder; it rises linearly from 0.
        position_scale: factor on the sin-cos positions; 1 in the paper.
        initial: standard deviation of the initial weights, see `ijepa.model.init`.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    position_scale: float = 1.0
    initial: InitScheme = "normal"


@dataclass(frozen=True)
class PredictorConfig:
    """The predictor; fields as in `EncoderConfig`."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    position_scale: float = 1.0
    initial: InitScheme = "normal"


@dataclass(frozen=True)
class ModelConfig:
    """Both encoders and the predictor.

    Attributes:
        image_size: height and width of the images in pixels; multiples of `patch_size`.
        patch_size: side length of a patch in pixels.
        encoder: the encoders.
        predictor: the predictor.
        position_grid: rows and columns that positions are interpolated from; None for those of `image_size`.
    """

    image_size: tuple[int, int]
    patch_size: int
    encoder: EncoderConfig
    predictor: PredictorConfig
    position_grid: tuple[int, int] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size
