"""The encoder as a graph: ONNX for other runtimes, a `torch.export` program for those with torch and without us.

Input `pixel_values` (B, 3, H, W) float32, normalised by ImageNet's mean and deviation, B at will; output
`last_hidden_state` (B, N, D).
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from ijepa.interop.dense import DenseEncoder
from ijepa.model.encoder import FrozenEncoder
from ijepa.utils.errors import UserError

INPUT, OUTPUT = "pixel_values", "last_hidden_state"
OPSET = 23
"""The newest set of operators that torch's exporter writes by itself."""
LARGE = 2 * 10**8
"""Bytes of weights above which they lie beside the graph: a graph that holds them is four times as large in memory."""


def data_of(file: Path) -> Path:
    """Return where the weights of a large graph lie: beside it."""
    return file.with_name(f"{file.name}.data")


def write_program(encoder: FrozenEncoder, file: Path, about: dict[str, str]) -> None:
    """Write what `torch.export.load` reads, with `about` as its extra files."""
    torch.export.save(_program(encoder), file, extra_files=about)


def write_onnx(encoder: FrozenEncoder, file: Path, about: dict[str, str]) -> None:
    """Write ONNX with `about` as its metadata; weights of more than `LARGE` bytes lie beside, in `data_of(file)`.

    The graph names that file, so `file` must have its final name.

    Raises:
        UserError: without the extra `onnx`.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("--format onnx", f"needs {error.name}", "pip install 'ijepa-pretrain[onnx]'") from None
    size = sum(value.numel() * value.element_size() for value in encoder.vit.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own internals
        program: Any = torch.onnx.export(
            _program(encoder),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    program.model.metadata_props.update(about)
    program.save(str(file), external_data=size > LARGE)


def _program(encoder: FrozenEncoder) -> torch.export.ExportedProgram:
    height, width = (side * encoder.patch_size for side in encoder.grid)
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 3, height, width)
    return torch.export.export(DenseEncoder(encoder.vit), (example,), dynamic_shapes={INPUT: {0: batch}})
