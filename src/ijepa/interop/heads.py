"""A linear probe's chosen head as a file: a layer (C, D) on the mean of the last block's patches, with its classes.

What a protocol does to features before the layer (standardisation, batch norm) is affine, and is folded into it, so
that transformers' and timm's classifiers are this layer and nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ijepa.config.recipe import ModelSection
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import write_bytes


@dataclass(frozen=True)
class Head:
    """`weight` (C, D) and `bias` (C,) float32, and the C classes' names."""

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]

    def write(self, file: Path) -> None:
        """Write a safetensors file with the names in its metadata; it is complete or absent.

        Raises:
            RunError: the disk refuses.
        """
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        data = save(tensors, {"format": "pt", "classes": json.dumps(self.classes)})
        try:
            write_bytes(file, data)
        except OSError as error:
            raise RunError(f"{file}: the head cannot be saved: {error.strerror}") from error

    @classmethod
    def read(cls, file: Path) -> "Head":
        """Read what `write` wrote.

        Raises:
            UserError: the file is nothing of the kind.
        """
        try:
            with safe_open(file, framework="pt") as content:
                names = json.loads((content.metadata() or {}).get("classes", "[]"))
                weight, bias = content.get_tensor("weight"), content.get_tensor("bias")
            if not isinstance(names, list):
                raise ValueError("its classes are no list")
            if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(names) != len(bias):
                shapes = f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)} and {len(names)} classes"
                raise ValueError(f"{shapes} do not fit one another")
            return cls(weight, bias, tuple(map(str, names)))
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(
                f"--head {file}", f"is no head ({error})", "`ijepa evaluate linear --save-head` writes one"
            ) from None

    def checked(self, model: ModelSection) -> "Head":
        """Return this head, if it fits an encoder of this shape.

        Raises:
            UserError: it does not.
        """
        if self.weight.shape[1] != model.encoder.width:
            raise UserError("--head", f"reads {self.weight.shape[1]} channels, the encoder has {model.encoder.width}")
        return self
