"""Pretraining and evaluation of I-JEPA: `ijepa.Recipe`, `ijepa.IJEPA`, `ijepa.load_encoder`.

These names are imported when they are first used, so that `import ijepa` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ijepa.config.recipe import Recipe as Recipe
    from ijepa.interop.weights import load_encoder as load_encoder
    from ijepa.model.ijepa import IJEPA as IJEPA

__version__ = "0.1.0"
__all__ = ["IJEPA", "Recipe", "__version__", "load_encoder"]

_WHERE = {"IJEPA": "ijepa.model.ijepa", "Recipe": "ijepa.config.recipe", "load_encoder": "ijepa.interop.weights"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'ijepa' has no attribute {name!r}")
