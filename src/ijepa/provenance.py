"""What a file of figures says about where they come from: versions, and the commit of the code."""

import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from ijepa import __version__


def versions() -> dict[str, str]:
    """Return the versions that numbers may depend on."""
    return {
        "ijepa": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def commit() -> str | None:
    """Return the commit of the checkout this package runs from, None where it is installed from elsewhere.

    None too where git cannot be run.
    """
    here = Path(__file__).resolve().parent
    if not (here.parents[1] / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
