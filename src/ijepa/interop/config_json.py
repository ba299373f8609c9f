"""The fields of other libraries' `config.json` that decide what an encoder computes; all others are ignored."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from ijepa.model.vision_transformer import NORM_EPS
from ijepa.utils.config import BaseConfig

Count = Annotated[int, Field(ge=1)]
PixelSize = Annotated[
    tuple[Count, Count], BeforeValidator(lambda size: (size, size) if isinstance(size, int) else size)
]
"""Height and width in pixels; one number for a square."""


def _layer_name(value: Any) -> Any:
    """Return the name of a layer type as timm compares it: `layer_norm` and `LayerNorm` are `layernorm`."""
    return value.replace("_", "").lower() if isinstance(value, str) else value


def _same_epsilon(value: float) -> float:
    if value != NORM_EPS:
        raise ValueError(f"only encoders with {NORM_EPS} are read")
    return value


class _LibraryConfig(BaseConfig):
    model_config = ConfigDict(extra="ignore")

    ijepa: dict[str, Any] | None = None
    """What `ijepa export` recorded: which encoder it is, and its source."""


class TransformersConfig(_LibraryConfig):
    """`config.json` of an I-JEPA model of transformers, with the defaults of its IJepaConfig."""

    model_type: Literal["ijepa"]
    hidden_size: Count | None = None
    num_attention_heads: Count = 12
    image_size: PixelSize = (224, 224)
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: Annotated[float, AfterValidator(_same_epsilon)] = 1e-12


class TimmArguments(BaseConfig):
    """Arguments of timm's VisionTransformer; None: the default of timm, with which we agree."""

    model_config = ConfigDict(extra="ignore")

    # Another activation or norm would load, but compute something else.
    class_token: bool | None = None
    num_heads: Count | None = None
    img_size: PixelSize | None = None
    act_layer: Annotated[Literal["gelu"] | None, BeforeValidator(_layer_name)] = None
    norm_layer: Annotated[Literal["layernorm"] | None, BeforeValidator(_layer_name)] = None


class TimmConfig(_LibraryConfig):
    """`config.json` of a folder that timm loads."""

    architecture: str
    model_args: TimmArguments | None = None
