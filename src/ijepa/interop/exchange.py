"""`ijepa export` and `ijepa import`: weights to the formats of other libraries, and from them.

An output is complete or absent. Tensors are copied from file to file one at a time, so that the memory needed is that
of the largest one; ONNX and programs need the whole encoder, and the original's format all parts.
"""

from pathlib import Path
from typing import Literal

from ijepa.config.recipe import ModelSection
from ijepa.interop.heads import Head
from ijepa.interop.official import write_official
from ijepa.interop.onnx import weights_file, write_onnx, write_program
from ijepa.interop.positions import POSITIONS, PREDICTOR_POSITIONS, Positions
from ijepa.interop.tensors import LazyTensor, write_safetensors, write_tensors
from ijepa.interop.timm import write_timm
from ijepa.interop.transformers import write_transformers
from ijepa.interop.weights import Weights, Which, resolve_weights
from ijepa.utils.errors import UserError
from ijepa.utils.files import atomic_dir, atomic_file, write_errors, write_text

Format = Literal["transformers", "timm", "official", "safetensors", "onnx", "program"]


def export_weights(
    weights: str | Path,
    out: Path,
    form: Format,
    *,
    which: Which = "target",
    head: Path | None = None,
    heads: int | None = None,
) -> Path:
    """Write an encoder, or all parts in the original's format, in the format of another library.

    Args:
        weights: Anything that holds an encoder.
        out: A new folder (transformers, timm, safetensors) or file (official, onnx, program; safetensors too, if it
            ends with `.safetensors`).
        form: The format.
        which: The encoder.
        head: Head of a linear probe to export as the classifier, from `ijepa evaluate linear --save-head`.
        heads: Attention heads of tensors that do not state them.

    Raises:
        UserError: `out` exists, or the head does not fit.
        RunError: `out` cannot be written.
    """
    # First, because an export of a large model takes minutes.
    check_output(out, *([weights_file(out)] if form == "onnx" else []))
    found = resolve_weights(weights, heads=heads)
    if head and form not in ("transformers", "timm"):
        raise UserError("--head", f"cannot be exported to {form}", "use transformers or timm")
    classifier = Head.read(head, found.recipe.model) if head else None
    about = {"encoder": which, "source": found.label}
    with write_errors(out):
        if form == "onnx":
            write_onnx(out, found.encoder(which), about)
        elif form in ("official", "program") or (form == "safetensors" and out.suffix == ".safetensors"):
            _write_file(out, form, found, which, about)
        else:
            _write_folder(out, form, found, which, classifier, about)
    return out


def import_weights(source: str | Path, out: Path, *, heads: int | None = None) -> Weights:
    """Write anything that holds an encoder as a weights folder of this package: a recipe, and every part there is.

    Raises:
        UserError: `out` exists, or `source` does not hold an encoder.
        RunError: `out` cannot be written.
    """
    check_output(out)
    found = resolve_weights(source, heads=heads)
    parts = {part: found.tensors(part) for part in found.parts}
    if "target_encoder" not in parts:  # commands evaluate the target encoder
        parts["target_encoder"] = parts.pop("context_encoder")
    with write_errors(out), atomic_dir(out) as folder:
        write_text(folder / "recipe.yaml", found.recipe.dump())
        for part, tensors in parts.items():
            write_tensors(folder, part, tensors)
    return resolve_weights(out)


def check_output(*paths: Path) -> None:
    """Check that new files or folders can be created.

    Raises:
        UserError: One of them exists, its folder does not, or its name is not UTF-8, which safetensors cannot read.
    """
    for path in paths:
        if path.exists():
            raise UserError(path, "already exists", "choose a different path")
        if not path.absolute().parent.is_dir():
            raise UserError(path, f"{path.absolute().parent} is not a folder")
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError:
            raise UserError(path, "is not a UTF-8 name", "choose a different path") from None


def _write_file(out: Path, form: Format, weights: Weights, which: Which, about: dict[str, str]) -> None:
    model = weights.recipe.model
    with atomic_file(out) as file:
        if form == "official":
            write_official(file, {part: _with_positions(model, part, weights) for part in weights.parts})
        elif form == "program":
            write_program(file, weights.encoder(which), about)
        else:
            write_safetensors(file, _with_positions(model, f"{which}_encoder", weights), about)


def _write_folder(
    out: Path, form: Format, weights: Weights, which: Which, head: Head | None, about: dict[str, str]
) -> None:
    model, part = weights.recipe.model, f"{which}_encoder"
    with atomic_dir(out) as folder:
        if form == "transformers":
            write_transformers(folder, model, _with_positions(model, part, weights), head, about)
        elif form == "timm":
            write_timm(folder, model, _with_positions(model, part, weights), head, about)
        else:
            write_text(folder / "recipe.yaml", weights.recipe.dump())
            write_tensors(folder, part, weights.tensors(part), about=about)


def _with_positions(model: ModelSection, part: str, weights: Weights) -> dict[str, LazyTensor]:
    """Return the tensors of a part and its position table (1, N, D), which other libraries store."""
    name, shape = (PREDICTOR_POSITIONS, model.predictor) if part == "predictor" else (POSITIONS, model.encoder)
    positions = Positions(model.grid, model.position_grid, shape.position_scale)
    table = LazyTensor((1, model.grid[0] * model.grid[1], shape.width), lambda: positions.table(shape.width))
    return {name: table, **weights.tensors(part)}
