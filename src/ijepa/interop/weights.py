"""One resolver for everything that may be called WEIGHTS on a command line or in `ijepa.load_encoder`.

* a run: its latest checkpoint;
* a checkpoint folder of a run;
* a weights folder: `recipe.yaml` beside `target_encoder.safetensors` (and the other parts, if kept);
* a folder of transformers or timm: `config.json` beside `model.safetensors`;
* a file: the original's `.pth.tar`, or plain safetensors under the original's names;
* the name of weights that come with the package (`scenes`).

What comes from elsewhere has no recipe: its `model` section is read from the tensors, the rest stands at its defaults.
What had to be guessed or replaced on the way is in `Weights.notes`, and a warning.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from ijepa.checkpoint.format import list_checkpoints
from ijepa.checkpoint.reader import CheckpointReader, check_shapes, verify_part
from ijepa.checkpoint.run_dir import Run
from ijepa.config.recipe import ModelSection, Recipe
from ijepa.interop.config_json import table
from ijepa.interop.infer_config import check_positions, encoder_shape, with_predictor
from ijepa.interop.official import PARTS, is_official, read_official
from ijepa.interop.positions import without_positions
from ijepa.interop.tensors import Lazy, metadata, open_tensors
from ijepa.interop.timm import read_timm
from ijepa.interop.transformers import read_transformers
from ijepa.model.encoder import FrozenEncoder
from ijepa.model.ijepa import IJEPA
from ijepa.model.vision_transformer import VisionTransformer
from ijepa.utils.alignment import aligned
from ijepa.utils.errors import Notice, UserError, did_you_mean
from ijepa.utils.files import read_json

Which = Literal["target", "context"]
Parts = Mapping[str, Mapping[str, Lazy]]
_ENCODERS = ("target_encoder.safetensors", "context_encoder.safetensors")


@dataclass(frozen=True)
class Weights:
    """Where weights lie, and the recipe they were trained by, or one that fits them."""

    folder: Path
    """The folder or file."""
    recipe: Recipe
    label: str
    run: Path | None = None
    """The run they belong to, if they do."""
    foreign: Parts | None = None
    """Their tensors by part, where they come from elsewhere."""
    notes: tuple[str, ...] = ()
    """What was guessed or replaced, in one line each."""
    verified: set[str] = field(default_factory=set, compare=False, repr=False)
    """Files of a checkpoint whose checksums have been compared."""

    @property
    def parts(self) -> list[str]:
        """Which of `context_encoder`, `target_encoder` and `predictor` are there."""
        if self.foreign is not None:
            return sorted(self.foreign)
        if (self.folder / "state.json").is_file():
            return sorted(PARTS.values())
        return sorted(part for part in PARTS.values() if (self.folder / f"{part}.safetensors").is_file())

    def tensors(self, part: str) -> dict[str, Lazy]:
        """Return the tensors of a part under our names, in float32; values are read when they are asked for.

        Raises:
            UserError: the part is not there, its file does not match its checksum, or its tensors are not those of the
                recipe's model.
        """
        with torch.device("meta"):
            model = IJEPA(self.recipe.model)
        wanted = {name: tuple(tensor.shape) for name, tensor in getattr(model, part).state_dict().items()}
        where = self.folder
        if part not in self.parts:
            there = " and ".join(name.replace("_", " ") for name in self.parts)
            hint = "; add --which context" if part == "target_encoder" and "context_encoder" in self.parts else ""
            raise UserError(where, f"holds no {part.replace('_', ' ')}", f"it holds {there}{hint}")
        if self.foreign is None:
            verify_part(self.folder, part, self.verified)
        if self.foreign is not None:
            found = without_positions(self.foreign[part])
        elif (file := self.folder / f"{part}.safetensors").exists() or not (self.folder / "state.json").exists():
            where, found = file, open_tensors(file)
        else:
            stored = CheckpointReader(self.folder, part)
            stored.check({f"{part}.{name}": shape for name, shape in wanted.items()}, f"{part}.")
            return {name: Lazy(shape, _reader(stored, f"{part}.{name}")) for name, shape in wanted.items()}
        check_shapes(lambda name: where, wanted, {name: tensor.shape for name, tensor in found.items()})
        return {name: tensor.single() for name, tensor in found.items()}

    def encoder(self, which: Which = "target") -> FrozenEncoder:
        """Return an encoder that is there; weights that are aligned in their file stay mapped from it.

        Raises:
            UserError: it is not there, or its tensors are not those of the recipe's model.
        """
        tensors = self.tensors(f"{which}_encoder")
        with torch.device("meta"):  # no memory for weights that the file's take the place of
            vit = VisionTransformer(self.recipe.model)
        # The same weights give the same features, to the bit, whatever file they come from.
        vit.load_state_dict({name: aligned(tensor.make()) for name, tensor in tensors.items()}, assign=True)
        return FrozenEncoder(vit)


def resolve_weights(weights: str | Path, *, heads: int | None = None) -> Weights:
    """Find out what WEIGHTS stands for; `heads` are the attention heads of tensors that do not say how many they have.

    What was guessed or replaced is a `Notice`.

    Raises:
        UserError: where it is nothing of the kind.
    """
    found = _resolve(weights, heads)
    for note in found.notes:
        warnings.warn(note, Notice, stacklevel=2)
    return found


def _resolve(weights: str | Path, heads: int | None) -> Weights:
    path = Path(weights)
    if not path.exists():
        if str(weights) in shipped_weights():
            path = shipped_folder(str(weights))
            return Weights(path, Recipe.load(path / "recipe.yaml"), f"{weights} (comes with the package)")
        raise UserError(weights, "no such run, checkpoint or weights", did_you_mean(str(weights), shipped_weights()))
    if path.is_file():
        return _from_file(path, heads)
    if (path / "checkpoints").is_dir() or ((path / "run.json").is_file() and not _has_weights(path)):
        saved = list_checkpoints(Run(path).checkpoints)
        if not saved:
            raise UserError(path, "the run has no checkpoint yet", "wait for one, or train on")
        return Weights(saved[-1], Run(path).recipe(), f"{path.name} ({saved[-1].name})", path)
    for recipe_file in (path / "recipe.yaml", path.parent.parent / "recipe.yaml"):
        if recipe_file.is_file() and _has_weights(path):
            run = recipe_file.parent if recipe_file.parent != path else None
            return Weights(path, Recipe.load(recipe_file), path.name, run)
    if (path / "config.json").is_file():
        return _from_config(path, heads)
    raise UserError(path, "holds no run, checkpoint or weights", "give a folder with recipe.yaml and weights")


def _has_weights(path: Path) -> bool:
    return any((path / name).is_file() for name in (*_ENCODERS, "state.json"))


def _from_file(path: Path, heads: int | None) -> Weights:
    if path.suffix == ".safetensors":
        named = {name.removeprefix("module."): tensor for name, tensor in open_tensors(path).items()}
        parts = {_part(metadata(path)): {name: t for name, t in named.items() if not name.startswith("head.")}}
    elif is_official(path):
        parts = read_official(path)
    else:
        raise UserError(path, "is no file of weights", "give a run, a folder of weights, .safetensors or .pth.tar")
    # The context encoder's positions come first: no moving average has rounded them.
    first, *others = (parts[part] for part in ("context_encoder", "target_encoder") if part in parts)
    model, notes = encoder_shape(first, path, heads=heads)
    if "predictor" in parts:
        model = with_predictor(model, parts["predictor"], path)
    for other in others:
        notes += check_positions(model, other, path)
    return Weights(path, _recipe(path, model), path.name, foreign=parts, notes=tuple(notes))


def _from_config(path: Path, heads: int | None) -> Weights:
    values = read_json(path / "config.json")
    if "architecture" in values:
        model, tensors, notes = read_timm(path, values, heads=heads)
    else:
        model, tensors, notes = read_transformers(path, values)
    part = _part(table(values, "ijepa", path / "config.json"))
    return Weights(path, _recipe(path, model), path.name, foreign={part: tensors}, notes=tuple(notes))


def _part(about: Mapping[str, Any]) -> str:
    """Which encoder a file says that it holds: the target's, where it says nothing."""
    return "context_encoder" if about.get("encoder") == "context" else "target_encoder"


def _recipe(path: Path, model: ModelSection) -> Recipe:
    values: dict[str, Any] = {
        "name": path.name.split(".")[0],
        "description": f"Imported from {path.name}: only the model section is known, everything else is a default.",
        "steps": 1,
        "schedule": {"warmup": "0 steps"},
        "model": model.model_dump(mode="json", by_alias=True),
    }
    try:
        return Recipe.read(values, str(path))
    except UserError:  # a grid too small for the paper's masks; whoever pretrains on sets them anew
        return Recipe.read({**values, "mask": {"min_context": 1}}, str(path))


def _reader(stored: CheckpointReader, name: str) -> Any:
    return lambda: stored.rows(name)


def shipped_weights() -> Sequence[str]:
    """Names of the weights that come with the package."""
    folder = shipped_folder("")
    return sorted(p.name for p in folder.iterdir() if (p / "recipe.yaml").is_file()) if folder.is_dir() else []


def shipped_folder(name: str) -> Path:
    """The folder of weights that come with the package: weights, recipe, and the curves of their run."""
    return Path(str(resources.files("ijepa"))) / "weights" / name


def load_encoder(weights: str | Path, which: Which = "target", *, heads: int | None = None) -> FrozenEncoder:
    """Load an encoder from anything that holds one.

    Args:
        weights: see the module.
        which: the target encoder, which the paper evaluates, or the context encoder.
        heads: attention heads of tensors that do not say how many they have.

    Returns:
        A frozen module (B, 3, H, W) -> (B, N, D), with `.embed_dim`, `.patch_size` and `.grid`.

    Raises:
        UserError: one line that names the file and what is wrong with it.
    """
    return resolve_weights(weights, heads=heads).encoder(which)
