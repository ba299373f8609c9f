"""The encoder as a graph: ONNX for other runtimes, and a `torch.export` program that runs without this package.

Input `pixel_values` (B, 3, H, W) float32, normalized with ImageNet's mean and deviation, for any B; output
`last_hidden_state` (B, N, D).
"""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch

from ijepa.interop.dense import DenseEncoder
from ijepa.model.encoder import FrozenEncoder
from ijepa.utils.errors import UserError
from ijepa.utils.files import fsync_path

INPUT, OUTPUT = "pixel_values", "last_hidden_state"
OPSET = 23
"""The newest operator set that torch's exporter writes without conversion."""
LARGE = 2 * 10**8
"""Bytes of weights above which they are in a second file: inside the graph they need four times the memory."""


def weights_file(path: Path) -> Path:
    """Return the file next to a large graph that holds its weights."""
    return path.with_name(f"{path.name}.data")


def write_program(file: BinaryIO, encoder: FrozenEncoder, about: dict[str, str]) -> None:
    """Write a program for `torch.export.load`, with `about` as its extra files."""
    torch.export.save(_program(encoder), file, extra_files=about)


def write_onnx(path: Path, encoder: FrozenEncoder, about: dict[str, str]) -> None:
    """Write an ONNX file with `about` as its metadata; it is complete or absent.

    Weights of more than `LARGE` bytes are in `weights_file(path)`.

    Raises:
        UserError: The extra `onnx` is not installed.
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
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder, path.name)  # the graph refers to the file of its weights by this name
        program.save(str(partial), external_data=size > LARGE)
        for file in (weights_file(partial), partial):  # the graph last: when it is there, all is there
            if file.exists():
                fsync_path(file)
                file.replace(path.with_name(file.name))


def _program(encoder: FrozenEncoder) -> torch.export.ExportedProgram:
    height, width = (side * encoder.patch_size for side in encoder.grid)
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 3, height, width)  # torch would fix a batch of 1 in the graph
    return torch.export.export(DenseEncoder(encoder.vit), (example,), dynamic_shapes={INPUT: {0: batch}})
