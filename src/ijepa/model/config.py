"""What a model is built from: plain values, which the caller has checked."""

from dataclasses import dataclass
from typing import Literal

InitScheme = Literal["normal", "xavier"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoders."""

    width: int  # embedding dimension; a multiple of 4, for the sin-cos positions, and of `heads`
    depth: int  # number of transformer blocks
    heads: int  # number of attention heads
    mlp_ratio: float = 4.0  # hidden width of the MLP over `width`
    drop_path: float = 0.0  # stochastic depth rate of the last block of the context encoder; it rises linearly from 0
    position_scale: float = 1.0  # factor on the sin-cos positions; 1 in the paper
    initial: InitScheme = "normal"  # standard deviation of the initial weights, see `ijepa.model.init`


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The predictor; its fields mean the same as those of `EncoderConfig`."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    position_scale: float = 1.0
    initial: InitScheme = "normal"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Both encoders and the predictor."""

    image_size: tuple[int, int]  # height and width of the images in pixels; multiples of `patch_size`
    patch_size: int  # side length of a patch in pixels
    position_grid: tuple[int, int] | None = None  # grid that positions are interpolated from; None: that of the images
    encoder: EncoderConfig
    predictor: PredictorConfig

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size
