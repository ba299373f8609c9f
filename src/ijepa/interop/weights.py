"""Finds what WEIGHTS on a command line, or in `ijepa.load_encoder`, stands for:

* a run: its latest checkpoint;
* a checkpoint folder of a run;
* a weights folder: `recipe.yaml` and `target_encoder.safetensors`, and other parts if they were kept;
* a folder of transformers or timm: `config.json` and `model.safetensors`;
* a file: a `.pth.tar` of the original code, or safetensors with the original's names;
* the name of weights that the package includes (`scenes`).

Weights of other libraries have no recipe. Its `model` section is inferred from the tensors, the rest has its defaults.
`Weights.notes`, and a warning, report what had to be guessed or replaced.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from ijepa.checkpoint.format import list_checkpoints
from ijepa.checkpoint.reader import CheckpointReader
from ijepa.checkpoint.run_dir import Run
from ijepa.checkpoint.verify import check_shapes, verify_part
from ijepa.config.recipe import ModelSection, Recipe
from ijepa.interop.config_json import TimmConfig, TransformersConfig
from ijepa.interop.infer_config import check_positions, infer_encoder, infer_predictor
from ijepa.interop.official import PARTS, is_official, read_official
from ijepa.interop.positions import without_positions
from ijepa.interop.tensors import LazyTensor, Tensors, metadata, open_tensors
from ijepa.interop.timm import read_timm
from ijepa.interop.transformers import read_transformers
from ijepa.model.encoder import FrozenEncoder
from ijepa.model.ijepa import IJEPA
from ijepa.model.vision_transformer import VisionTransformer
from ijepa.utils.alignment import aligned
from ijepa.utils.errors import Notice, UserError, did_you_mean
from ijepa.utils.files import read_json

Which = Literal["target", "context"]
_ENCODERS = ("target_encoder.safetensors", "context_encoder.safetensors")


@dataclass(frozen=True)
class Weights:
    """Weights on disk, with the recipe that they were trained with, or one that fits them.

    Attributes:
        folder: Their folder or file.
        recipe: The recipe.
        label: What outputs call them.
        run: Their run, if they belong to one.
        imported: Their tensors by part, if they come from another library.
        notes: What was guessed or replaced, one line each.
        verified: Files of a checkpoint whose checksums have been compared.
    """

    folder: Path
    recipe: Recipe
    label: str
    run: Path | None = None
    imported: Mapping[str, Tensors] | None = None
    notes: tuple[str, ...] = ()
    verified: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def parts(self) -> list[str]:
        """Those of `context_encoder`, `target_encoder` and `predictor` that exist."""
        if self.imported is not None:
            return sorted(self.imported)
        if (self.folder / "state.json").is_file():
            return sorted(PARTS.values())
        return sorted(part for part in PARTS.values() if (self.folder / f"{part}.safetensors").is_file())

    def tensors(self, part: str) -> dict[str, LazyTensor]:
        """Return the tensors of a part by our names, in float32; values are read when they are needed.

        Raises:
            UserError: The part does not exist, its file does not match its checksum, or its tensors do not fit the
                recipe's model.
        """
        with torch.device("meta"):
            model = IJEPA(self.recipe.model)
        wanted = {name: tuple(tensor.shape) for name, tensor in getattr(model, part).state_dict().items()}
        if part not in self.parts:
            existing = " and ".join(self.parts).replace("_", " ")
            hint = "; add --which context" if part == "target_encoder" and "context_encoder" in self.parts else ""
            raise UserError(self.folder, f"has no {part.replace('_', ' ')}", f"it has {existing}{hint}")
        file = self.folder
        if self.imported is not None:
            found = without_positions(self.imported[part])
        else:
            verify_part(self.folder, part, self.verified)
            file = self.folder / f"{part}.safetensors"
            if not file.exists():  # a checkpoint whose ranks each wrote a share of every tensor
                stored, prefix = CheckpointReader(self.folder, part), f"{part}."
                stored.check({prefix + name: shape for name, shape in wanted.items()}, prefix)
                return {name: LazyTensor(shape, partial(stored.rows, prefix + name)) for name, shape in wanted.items()}
            found = open_tensors(file)
        check_shapes(lambda name: file, wanted, {name: tensor.shape for name, tensor in found.items()})
        return {name: tensor.float32() for name, tensor in found.items()}

    def encoder(self, which: Which = "target") -> FrozenEncoder:
        """Return one of the encoders; weights that are aligned in their file stay mapped from it.

        Raises:
            UserError: It does not exist, or its tensors do not fit the recipe's model.
        """
        tensors = self.tensors(f"{which}_encoder")
        with torch.device("meta"):  # no memory for initial weights
            vit = VisionTransformer(self.recipe.model)
        # Aligned weights give features with the same bits, whatever file they come from; `assign` keeps them mapped.
        vit.load_state_dict({name: aligned(tensor.load()) for name, tensor in tensors.items()}, assign=True)
        return FrozenEncoder(vit)


def load_encoder(weights: str | Path, which: Which = "target", *, heads: int | None = None) -> FrozenEncoder:
    """Load an encoder from anything that holds one.

    Args:
        weights: See the module.
        which: The target encoder, which the paper evaluates, or the context encoder.
        heads: Attention heads of tensors that do not state them.

    Returns:
        A frozen module (B, 3, H, W) -> (B, N, D), with `.embed_dim`, `.patch_size` and `.grid`.

    Raises:
        UserError: One line that names the file and what is wrong with it.
    """
    return resolve_weights(weights, heads=heads).encoder(which)


def resolve_weights(weights: str | Path, *, heads: int | None = None) -> Weights:
    """Find out what WEIGHTS stands for; a `Notice` warns of what was guessed or replaced.

    Args:
        weights: See the module.
        heads: Attention heads of tensors that do not state them.

    Raises:
        UserError: It does not stand for weights.
    """
    found = _resolve(weights, heads)
    for note in found.notes:
        warnings.warn(note, Notice, stacklevel=2)
    return found


def _resolve(weights: str | Path, heads: int | None) -> Weights:
    path, name = Path(weights), str(weights)
    if not path.exists():
        if name not in shipped_weights():
            raise UserError(weights, "no such run, checkpoint or weights", did_you_mean(name, shipped_weights()))
        path = shipped_folder(name)
        return Weights(path, Recipe.load(path / "recipe.yaml"), f"{name} (included in ijepa)")
    if path.is_file():
        return _from_file(path, heads)
    # A young run has run.json and no checkpoint; an archive has run.json and weights.
    if (path / "checkpoints").is_dir() or ((path / "run.json").is_file() and not _has_weights(path)):
        run = Run(path)
        saved = list_checkpoints(run.checkpoints)
        if not saved:
            raise UserError(path, "the run has no checkpoint yet", "wait for the first one, or resume the run")
        return Weights(saved[-1], run.recipe(), f"{path.name} ({saved[-1].name})", path)
    run_folder = path.parent.parent  # of RUN/checkpoints/step-...
    for folder, owner in ((path, None), (run_folder, run_folder)):
        if (folder / "recipe.yaml").is_file() and _has_weights(path):
            return Weights(path, Recipe.load(folder / "recipe.yaml"), path.name, owner)
    if (path / "config.json").is_file():
        return _from_config(path, heads)
    raise UserError(path, "is not a run, a checkpoint or weights", "give a folder with recipe.yaml and weights")


def _has_weights(path: Path) -> bool:
    return any((path / name).is_file() for name in (*_ENCODERS, "state.json"))


def _from_file(path: Path, heads: int | None) -> Weights:
    if path.suffix == ".safetensors":
        named = {name.removeprefix("module."): tensor for name, tensor in open_tensors(path).items()}
        parts = {_part(metadata(path)): {name: t for name, t in named.items() if not name.startswith("head.")}}
    elif is_official(path):
        parts = read_official(path)
    else:
        raise UserError(path, "is not a weights file", "give a run, a folder of weights, .safetensors or .pth.tar")
    # The context encoder comes first: the moving average has not rounded its positions.
    first, *others = (parts[part] for part in ("context_encoder", "target_encoder") if part in parts)
    model, notes = infer_encoder(first, path, heads=heads)
    if "predictor" in parts:
        model = infer_predictor(model, parts["predictor"], path)
    for other in others:
        notes += check_positions(model, other, path)
    return Weights(path, _recipe(path, model), path.name, imported=parts, notes=tuple(notes))


def _from_config(path: Path, heads: int | None) -> Weights:
    file = path / "config.json"
    values = read_json(file)
    config: TimmConfig | TransformersConfig
    if "architecture" in values:
        config = TimmConfig.read(values, str(file))
        model, tensors, notes = read_timm(path, config, heads=heads)
    else:
        config = TransformersConfig.read(values, str(file))
        model, tensors, notes = read_transformers(path, config)
    parts = {_part(config.ijepa or {}): tensors}
    return Weights(path, _recipe(path, model), path.name, imported=parts, notes=tuple(notes))


def _part(about: Mapping[str, Any]) -> str:
    """Return which encoder a file states that it holds; the target encoder if it states none."""
    return "context_encoder" if about.get("encoder") == "context" else "target_encoder"


def _recipe(path: Path, model: ModelSection) -> Recipe:
    values: dict[str, Any] = {
        "name": path.name.split(".")[0],
        "description": f"Imported from {path.name}: only the model section is known, all other values are defaults.",
        "steps": 1,  # a recipe needs a length
        "schedule": {"warmup": "0 steps"},
        "model": model.model_dump(mode="json", by_alias=True),
    }
    try:
        return Recipe.read(values, str(path))
    except UserError:  # the grid is too small for the masks of the paper; a user who pretrains on it sets others
        return Recipe.read({**values, "mask": {"min_context": 1}}, str(path))


def shipped_weights() -> Sequence[str]:
    """Return the names of the weights that the package includes."""
    folder = shipped_folder("")
    return sorted(p.name for p in folder.iterdir() if (p / "recipe.yaml").is_file()) if folder.is_dir() else []


def shipped_folder(name: str) -> Path:
    """Return the folder of weights that the package includes: weights, recipe, and the curves of their run."""
    return Path(str(resources.files("ijepa"))) / "weights" / name
