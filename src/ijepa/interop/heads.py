"""The head that a linear probe has chosen, as a file: a layer (C, D) on the mean of the patches, with its classes.

What a protocol does to features before the layer (standardization, batch norm) is affine and is merged into the layer,
so that it can be the classifier of transformers and timm.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ijepa.config.recipe import ModelSection
from ijepa.interop.tensors import LazyTensor
from ijepa.utils.errors import UserError
from ijepa.utils.files import write_bytes, write_errors


@dataclass(frozen=True)
class Head:
    """A linear classifier: `weight` (C, D) and `bias` (C,) float32, and the names of the C classes."""

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]

    def write(self, file: Path) -> None:
        """Write a safetensors file with the names in its metadata; it is complete or absent.

        Raises:
            RunError: The file cannot be written.
        """
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        with write_errors(file):
            write_bytes(file, save(tensors, {"format": "pt", "classes": json.dumps(self.classes)}))

    @classmethod
    def read(cls, file: Path, model: ModelSection) -> "Head":
        """Read what `write` wrote, for an encoder of this shape.

        Raises:
            UserError: The file does not hold a head, or its head is for features of another width.
        """
        try:
            with safe_open(file, framework="pt") as content:
                names = json.loads((content.metadata() or {}).get("classes", "[]"))
                weight, bias = content.get_tensor("weight"), content.get_tensor("bias")
            if not isinstance(names, list):
                raise ValueError("its classes are not a list")
            if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(names) != len(bias):
                shapes = f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)} and {len(names)} classes"
                raise ValueError(f"{shapes} do not fit together")
        except (OSError, SafetensorError, ValueError) as error:
            hint = "`ijepa evaluate linear --save-head` writes one"
            raise UserError(f"--head {file}", f"is not a head file ({error})", hint) from None
        if weight.shape[1] != model.encoder.width:
            raise UserError(
                f"--head {file}", f"needs {weight.shape[1]} channels, but the encoder has {model.encoder.width}"
            )
        return cls(weight, bias, tuple(map(str, names)))

    def named(self, layer: str) -> dict[str, LazyTensor]:
        """Return weight and bias under the name of another library's classifier layer."""
        return {f"{layer}.weight": LazyTensor.of(self.weight), f"{layer}.bias": LazyTensor.of(self.bias)}
