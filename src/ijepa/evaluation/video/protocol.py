"""Protocols of label propagation in videos: every number that decides a result, typed, in YAML beside the code."""

from pydantic import Field

from ijepa.evaluation.features.precision import Autocast
from ijepa.utils.config import Section


class PropagationProtocol(Section):
    """How labels are carried from a video's first frame to the others."""

    name: str
    """What results call it."""
    description: str = ""
    """What it follows, and where it departs from that."""
    short_side: int = Field(480, ge=1)
    """Pixels to which a frame's short side is brought; both sides are then cut down to whole patches."""
    memory: int = Field(7, ge=0)
    """Frames before the present one that labels are taken from, besides the first."""
    neighbours: int = Field(5, ge=1)
    """Patches whose labels a patch takes."""
    radius: int = Field(12, ge=0)
    """Rows and columns of patches that those are away at most."""
    temperature: float = Field(0.1, gt=0)
    """T of their weights, exp(cosine / T)."""
    autocast: Autocast = "auto"
    """Precision of the encoder: none (float32), bf16, or auto, which is bf16 on a GPU and float32 on a CPU."""
