"""`ijepa export` and `ijepa import`: weights out in the forms that others read, and in from them.

What is written is complete or absent: it is written beside its place and renamed. Tensors go from file to file one at a
time, so that the memory needed is that of the largest one, but for ONNX and programs, which hold the encoder.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from ijepa.config.recipe import ModelSection
from ijepa.interop import timm, transformers
from ijepa.interop.heads import Head
from ijepa.interop.official import write_official
from ijepa.interop.onnx import data_of, write_onnx, write_program
from ijepa.interop.positions import POSITIONS, PREDICTOR_POSITIONS, Positions
from ijepa.interop.tensors import SHARD, Lazy, write_tensors
from ijepa.interop.weights import Weights, Which, resolve_weights
from ijepa.utils.errors import RunError, UserError
from ijepa.utils.files import write_json, write_text

Format = Literal["transformers", "timm", "official", "safetensors", "onnx", "program"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export_weights(
    weights: str | Path,
    out: Path,
    form: Format,
    *,
    which: Which = "target",
    head: Path | None = None,
    heads: int | None = None,
) -> Path:
    """Write an encoder (the original's form: all parts that are there) in another library's form.

    Args:
        weights: anything that holds an encoder.
        out: a new folder (transformers, timm, safetensors) or file (official, onnx, program; safetensors too, if it
            ends with `.safetensors`).
        form: the form.
        which: the encoder.
        head: a linear probe's head, as `ijepa evaluate linear --save-head` writes it, to become the classifier.
        heads: attention heads of tensors that do not say how many they have.

    Raises:
        UserError: `out` exists, or a head that does not fit.
        RunError: the disk refuses.
    """
    found = resolve_weights(weights, heads=heads)
    model, part = found.recipe.model, f"{which}_encoder"
    tensors = {**_positions(model), **found.tensors(part)}
    kept = Head.read(head).checked(model) if head else None
    if kept and form not in ("transformers", "timm"):
        raise UserError("--head", f"has no place in {form}", "use transformers or timm")
    about = {"encoder": which, "source": found.label}
    with written(out, *([data_of(out)] if form == "onnx" else [])) as beside:
        if form == "official":
            parts = {name: {**_positions(model, name), **found.tensors(name)} for name in found.parts}
            write_official(beside, parts, epoch=0)
        elif form == "onnx":
            write_onnx(found.encoder(which), beside, about)
        elif form == "program":
            write_program(found.encoder(which), beside, about)
        elif form == "safetensors" and out.suffix == ".safetensors":
            write_tensors(beside.parent, beside.stem, tensors, about=about)
        else:
            beside.mkdir()
            _write_folder(beside, form, model, tensors, kept, about)
            if form == "safetensors":
                write_text(beside / "recipe.yaml", found.recipe.dump())
                write_tensors(beside, part, found.tensors(part), about=about)
    return out


def import_weights(source: str | Path, out: Path, *, heads: int | None = None) -> Weights:
    """Write anything that holds an encoder as a weights folder of ours: a recipe, and every part that is there.

    Raises:
        UserError: `out` exists, or `source` is nothing of the kind.
        RunError: the disk refuses.
    """
    found = resolve_weights(source, heads=heads)
    parts = {part: found.tensors(part) for part in found.parts}
    if "target_encoder" not in parts:  # what there is becomes what is evaluated
        parts["target_encoder"] = parts.pop("context_encoder")
    with written(out) as beside:
        beside.mkdir()
        write_text(beside / "recipe.yaml", found.recipe.dump())
        for part, tensors in parts.items():
            write_tensors(beside, part, tensors)
    return resolve_weights(out)


@contextmanager
def written(out: Path, *more: Path) -> Iterator[Path]:
    """Give a place of `out`'s own name to write to, in a folder beside; what is there moves out when all went well.

    Args:
        out: the file or folder that is written.
        more: files that may be written beside it.

    Raises:
        UserError: one of them exists, or their folder does not.
        RunError: the disk refuses.
    """
    out = out.absolute()
    for place in (out, *more):
        if place.exists():
            raise UserError(place, "exists already", "give another place")
    if not out.parent.is_dir():
        raise UserError(out, f"{out.parent} is no folder")
    beside = out.with_name(f".{os.getpid()}.{out.name}")
    moved: list[Path] = []
    try:
        beside.mkdir()
        yield beside / out.name
        for file in sorted(beside.iterdir(), key=lambda file: file.name == out.name):  # `out` last: then all is there
            moved.append(file.replace(out.with_name(file.name)))
    except OSError as error:
        for place in moved:
            place.unlink(missing_ok=True)
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_folder(
    folder: Path, form: Format, model: ModelSection, tensors: dict[str, Lazy], head: Head | None, about: dict[str, Any]
) -> None:
    if form == "transformers":
        named = transformers.to_theirs(tensors, "ijepa." if head else "")
        if head:
            named |= {"classifier.weight": Lazy.of(head.weight), "classifier.bias": Lazy.of(head.bias)}
        write_tensors(folder, "model", named, shard=SHARD)
        write_json(folder / "config.json", transformers.config(model, head.classes if head else None, ijepa=about))
        write_json(folder / "preprocessor_config.json", transformers.processor(model))
    elif form == "timm":
        named = dict(tensors)
        if head:
            named |= {"head.weight": Lazy.of(head.weight), "head.bias": Lazy.of(head.bias)}
        write_tensors(folder, "model", named)
        write_json(folder / "config.json", {**timm.config(model, len(head.bias) if head else 0), "ijepa": about})


def _positions(model: ModelSection, part: str = "target_encoder") -> dict[str, Lazy]:
    """Return the table of positions (1, N, D) that others keep among the weights."""
    name, sizes = (PREDICTOR_POSITIONS, model.predictor) if part == "predictor" else (POSITIONS, model.encoder)
    made = Positions(model.grid, model.position_grid, sizes.position_scale)
    return {name: Lazy((1, model.grid[0] * model.grid[1], sizes.width), lambda: made.table(sizes.width))}
