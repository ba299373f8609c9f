"""One resolver for everything that may be called WEIGHTS on a command line or in `ijepa.load_encoder`.

* a run: its latest checkpoint;
* a checkpoint folder of a run;
* a weights folder: `recipe.yaml` beside `target_encoder.safetensors` (and the other parts, if kept);
* the name of weights that come with the package (`scenes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from ijepa.errors import Refused, did_you_mean
from ijepa.model.encoder import Encoder
from ijepa.model.jepa import build_encoder
from ijepa.recipe import Recipe
from ijepa.training.checkpoint import list_checkpoints, load_part
from ijepa.training.run import Run

Which = Literal["target", "context"]


@dataclass(frozen=True)
class Weights:
    """Where weights lie, and the recipe they were trained by."""

    folder: Path
    recipe: Recipe
    label: str
    run: Path | None = None
    """The run they belong to, if they do."""

    def file(self, which: Which) -> Path:
        """The safetensors file of one encoder."""
        return self.folder / f"{which}_encoder.safetensors"


def resolve_weights(weights: str | Path) -> Weights:
    """Find out what WEIGHTS stands for.

    Raises:
        Refused: where it is nothing of the kind.
    """
    path = Path(weights)
    if not path.exists():
        if str(weights) in shipped_weights():
            path = shipped_folder(str(weights))
            return Weights(path, Recipe.load(path / "recipe.yaml"), f"{weights} (comes with the package)")
        raise Refused(weights, "no such run, checkpoint or weights", did_you_mean(str(weights), shipped_weights()))
    if path.is_file():
        raise Refused(path, "is a file", "give a run, a checkpoint folder, or a folder of recipe.yaml and weights")
    if (path / "checkpoints").is_dir() or (path / "run.json").is_file():
        saved = list_checkpoints(Run(path).checkpoints)
        if not saved:
            raise Refused(path, "the run has no checkpoint yet", "wait for one, or train on")
        return Weights(saved[-1], Run(path).recipe(), f"{path.name} ({saved[-1].name})", path)
    for recipe_file in (path / "recipe.yaml", path.parent.parent / "recipe.yaml"):
        there = (path / name for name in ("target_encoder.safetensors", "state.json"))
        if recipe_file.is_file() and any(file.is_file() for file in there):
            run = recipe_file.parent if recipe_file.parent != path else None
            return Weights(path, Recipe.load(recipe_file), path.name, run)
    raise Refused(path, "holds no run, checkpoint or weights", "give a folder with recipe.yaml and weights")


def shipped_weights() -> Sequence[str]:
    """Names of the weights that come with the package."""
    folder = shipped_folder("")
    return sorted(p.name for p in folder.iterdir() if (p / "recipe.yaml").is_file()) if folder.is_dir() else []


def shipped_folder(name: str) -> Path:
    """The folder of weights that come with the package: weights, recipe, and the curves of their run."""
    return Path(str(resources.files("ijepa"))) / "weights" / name


def load_encoder(weights: str | Path, which: Which = "target") -> Encoder:
    """Load an encoder from a run, a checkpoint, a weights folder, or a name that comes with the package.

    Args:
        weights: see the module.
        which: the target encoder, which the paper evaluates, or the context encoder.

    Returns:
        A frozen module (B, 3, H, W) -> (B, N, D), with `.embed_dim`, `.patch_size` and `.grid`.

    Raises:
        Refused: one line that names the file and what is wrong with it.
    """
    found = resolve_weights(weights)
    vit = build_encoder(found.recipe.model)
    load_part(vit, found.folder, f"{which}_encoder")
    return Encoder(vit)
