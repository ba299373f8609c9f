"""A linear probe's chosen head as a file: a layer (C, D) on the mean of the last block's patches, with its classes.

What a protocol does to features before the layer (standardisation, batch norm) is affine, and is folded into it, so
that transformers' and timm's classifiers are this layer and nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ijepa.errors import Refused
from ijepa.recipe import Model


@dataclass(frozen=True)
class Head:
    """`weight` (C, D) and `bias` (C,) float32, and the C classes' names."""

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]

    def write(self, file: Path) -> None:
        """Write a safetensors file with the names in its metadata."""
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        save_file(tensors, file, {"format": "pt", "classes": json.dumps(self.classes)})

    @classmethod
    def read(cls, file: Path) -> "Head":
        """Read what `write` wrote.

        Raises:
            Refused: the file is nothing of the kind.
        """
        try:
            with safe_open(file, framework="pt") as content:
                names = json.loads((content.metadata() or {}).get("classes", "[]"))
                return cls(content.get_tensor("weight"), content.get_tensor("bias"), tuple(map(str, names)))
        except (OSError, SafetensorError, ValueError) as error:
            raise Refused(
                f"--head {file}", f"is no head ({error})", "`ijepa evaluate linear --save-head` writes one"
            ) from None

    def checked(self, model: Model) -> "Head":
        """Return this head, if it fits an encoder of this shape.

        Raises:
            Refused: it does not.
        """
        if self.weight.shape != (len(self.bias), model.encoder.width) or len(self.classes) != len(self.bias):
            raise Refused("--head", f"reads {self.weight.shape[1]} channels, the encoder has {model.encoder.width}")
        return self
