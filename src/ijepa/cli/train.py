"""`ijepa pretrain`, `plan` and `demo`: what a recipe is for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ijepa.cli.options import RecipeCommand, debug_option, first_process, load_recipe, open_images
from ijepa.config.files import presets
from ijepa.config.recipe import Recipe
from ijepa.utils.errors import Failed, Refused

_EPILOG = f"Presets: {', '.join(presets())}. Defaults are those of a recipe that says nothing; presets say much."


@click.command(cls=RecipeCommand, epilog=_EPILOG)
@click.argument("recipe")
@click.option("--output", type=click.Path(path_type=Path), help="The run's folder; runs/NAME if not given.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "last-good", "never"]),
    default="auto",
    show_default=True,
    help="auto continues the run in the folder from its latest checkpoint and refuses a damaged one; last-good "
    "continues from the latest checkpoint that is not damaged; never refuses a folder that holds a run.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and its cost; write nothing.")
@click.option(
    "--diagnose-every",
    type=click.IntRange(min=0),
    default=None,
    metavar="N",
    help="Measure RankMe, std and position R^2 every N steps, and warn of a collapse; a tenth of the run, 50 to 5,000 "
    "steps, if not given; 0: only at start and end.",
)
@click.option(
    "--diagnose-data",
    metavar="PATH",
    default=None,
    help="Images to measure on; if not given, data.path's validation split, or data.path itself where it has none.",
)
@click.option("--profile", metavar="FIRST-LAST", help="Trace these steps, counted from 1, into the run's profile/.")
@debug_option
def pretrain(
    recipe: str,
    output: Path | None,
    resume: Any,
    dry_run: bool,
    diagnose_every: int | None,
    diagnose_data: str | None,
    profile: str | None,
    **fields: Any,
) -> None:
    """Pretrain by RECIPE, a preset's name or a YAML file; the same command resumes."""
    loaded = load_recipe(recipe, fields)
    if dry_run:
        from ijepa.planning.outlook import describe

        source = open_images(loaded.data.path) if loaded.data.path else None
        click.echo(describe(loaded, len(source) if source else None))
        return
    if loaded.data.path is None:
        raise Refused("data.path", "no data given", "add --data.path with images or tar shards")
    from ijepa.interop.init_from import beginning
    from ijepa.training.loop import pretrain as run
    from ijepa.training.profiler import Window

    window = Window.parse(profile) if profile else None
    source = open_images(loaded.data.path)
    info = {"data": {"path": _shown(loaded.data.path)}}
    folder = output or Path("runs") / loaded.name
    begun = beginning(loaded)
    loaded = begun.recipe if begun else loaded
    callback = _diagnosis(loaded, len(source), diagnose_every, diagnose_data, folder)
    run(
        loaded,
        source,
        folder,
        resume=resume,
        callbacks=callback,
        info={**info, **({"init": begun.label} if begun else {})},
        profile=window,
        initial=begun.tensors if begun else None,
    )
    if first_process():
        click.echo(f"done: {folder}")


def _shown(path: str) -> str:
    """A data path as a run records it: whole, unless it is no path of this machine."""
    return path if "://" in path or path.startswith("hf:") else str(Path(path).resolve())


_LEAST, _MOST = 50, 5000
"""Steps between two measurements that nobody asked for: rarely enough to cost little in the shortest runs, and often
enough to see within the hour that a long one goes wrong."""


def _diagnosis(recipe: Recipe, images: int, every: int | None, data: str | None, folder: Path) -> Sequence[Any]:
    """Return the callback that measures the target encoder on a fixed batch on the way, and warns of what it sees."""
    from ijepa.data.open import open_source
    from ijepa.evaluation.diagnostics.online import online_diagnosis
    from ijepa.evaluation.diagnostics.warnings import new_warnings
    from ijepa.training.loop import Callback

    where = "data.path" if data is None else "--diagnose-data"
    try:
        held_out = open_source(data or str(recipe.data.path), where=where, split="val")
    except Refused as error:
        if data is not None:
            raise
        held_out = open_images(str(recipe.data.path))
        if first_process():
            click.echo(f"measured on training images: {error}")
    total = recipe.lengths(images).total
    every = min(total, max(_LEAST, min(_MOST, total // 10))) if every is None else every
    return [Callback(every or total, online_diagnosis(held_out, recipe.model.image_hw), new_warnings(folder))]


@click.command(cls=RecipeCommand, epilog=_EPILOG)
@click.argument("recipe")
@click.option("--gpu", default="h100", show_default=True, metavar="NAME", help="a100, h100, h200 or b200.")
@click.option("--gpus", type=int, default=8, show_default=True, help="How many; must divide batch.global.")
@click.option("--images-per-second", type=float, metavar="X", help="Rate of all GPUs; else --share-of-peak gives it.")
@click.option(
    "--share-of-peak",
    type=float,
    default=0.35,
    show_default=True,
    metavar="X",
    help="Executed operations over the dense bf16 peak.",
)
@click.option("--country", default="World", show_default=True, metavar="NAME", help="Whose electricity.")
@click.option("--json", "file", type=click.Path(path_type=Path), metavar="FILE", help="Also write every figure there.")
@debug_option
def plan(
    recipe: str,
    gpu: str,
    gpus: int,
    images_per_second: float | None,
    share_of_peak: float,
    country: str,
    file: Path | None,
    **fields: Any,
) -> None:
    """Plan RECIPE on given hardware: size, FLOPs, memory a GPU, days, energy, CO2; no device needed."""
    from ijepa.planning.outlook import outlook
    from ijepa.planning.text import show
    from ijepa.utils.files import write_json

    loaded = load_recipe(recipe, fields)
    if file is not None and not file.absolute().parent.is_dir():
        raise Refused(f"--json {file}", f"{file.parent} is no folder")
    source = open_images(loaded.data.path) if loaded.data.path else None
    found = outlook(
        loaded,
        gpu=gpu,
        devices=gpus,
        images_per_second=images_per_second,
        share_of_peak=share_of_peak,
        country=country,
        images=len(source) if source else None,
    )
    show(found)
    if file is not None:
        try:
            write_json(file, found.as_json())
        except OSError as error:
            raise Failed(f"{file}: cannot be written: {error.strerror}") from None
        click.echo(f"plan: {file}")


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="The run's folder."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws scenes, weights, masks.")
@debug_option
def demo(output: Path, seed: int) -> None:
    """Go the whole journey on the built-in scenes: data, pretraining, evaluation, report."""
    from ijepa.demo import run

    run(output, seed=seed)
