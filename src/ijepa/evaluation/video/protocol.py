"""Protocols of label propagation in videos: all settings that determine a result, typed."""

from pydantic import Field

from ijepa.evaluation.features.precision import Autocast
from ijepa.utils.config import BaseConfig


class PropagationProtocol(BaseConfig):
    """How labels are propagated from the first frame of a video to the other frames."""

    name: str
    """Name of the protocol in results."""
    description: str = ""
    """Description: the published protocol that it follows, and the differences."""
    short_side: int = Field(480, ge=1)
    """Length in pixels to which the short side of a frame is resized. Both sides are then cropped to whole patches."""
    memory: int = Field(7, ge=0)
    """Number of preceding frames from which labels are propagated, in addition to the first frame."""
    neighbors: int = Field(5, ge=1)
    """Number of nearest patches from which a patch takes its label."""
    radius: int = Field(12, ge=0)
    """Largest distance to those patches, in rows and in columns of patches."""
    temperature: float = Field(0.1, gt=0)
    """Temperature T of the weights of those patches, exp(cosine / T)."""
    autocast: Autocast = "auto"
    """Precision of the encoder: none (float32), bf16, or auto (bf16 on a GPU, float32 on a CPU)."""
