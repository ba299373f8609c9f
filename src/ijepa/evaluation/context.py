"""Settings that every evaluation has, in addition to encoders, data and a protocol."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ijepa.distributed.launch import local_device
from ijepa.distributed.process_group import SINGLE_PROCESS, World
from ijepa.utils.progress import Progress


@dataclass(frozen=True)
class EvaluationContext:
    """The seed of an evaluation, and where and with which processes it is computed."""

    seed: int = 0
    """Seed of everything that is drawn: images, held-out parts, initial weights, starts of k-means, intervals."""
    cache: Path | None = None
    """Folder for cached features of images; None: nothing is cached."""
    progress: Progress | None = None
    """Called with a line of text about the progress."""
    world: World = SINGLE_PROCESS
    """The processes that share the forward passes."""
    device: torch.device = field(default_factory=local_device)
    """Device of the encoders."""
    precision: torch.dtype = torch.float32
    """Data type in which the encoders compute."""

    def report(self, line: str) -> None:
        """Report a line of progress."""
        if self.progress is not None:
            self.progress(line)


DEFAULT_CONTEXT = EvaluationContext()
"""Seed 0, one process, no cache, no progress."""
