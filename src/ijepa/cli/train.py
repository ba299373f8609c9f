"""`ijepa pretrain`, `plan` and `demo`: what a recipe is for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ijepa.cli.options import NOT_NEGATIVE, PATH, RecipeCommand, debug_option, first_process, load_recipe, open_images
from ijepa.config.files import RECIPES, preset_names
from ijepa.config.recipe import Recipe
from ijepa.utils.errors import UserError

_EPILOG = (
    f"Presets: {', '.join(preset_names(RECIPES))}. The defaults shown apply to an empty recipe. Presets override many "
    "of them. The value none clears an optional field."
)


@click.command(cls=RecipeCommand, epilog=_EPILOG)
@click.argument("recipe")
@click.option("--output", type=PATH, help="Run folder. Default: runs/NAME.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "last-good", "never"]),
    default="auto",
    help="What to do if the run folder already contains a run. auto: continue from the latest checkpoint, and stop "
    "with an error if it is damaged. last-good: continue from the latest checkpoint that is not damaged. never: stop "
    "with an error.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and its cost. Write nothing.")
@click.option(
    "--diagnose-every",
    type=NOT_NEGATIVE,
    metavar="N",
    help="Measure RankMe, standard deviation and position R^2 every N steps, and warn of a collapse. 0: measure only "
    "at the start and at the end. Default: a tenth of the run, but at least 50 and at most 5,000 steps.",
)
@click.option(
    "--diagnose-data",
    metavar="PATH",
    help="Images for the measurements of --diagnose-every. Default: the validation split of data.path, or data.path "
    "itself if it has no validation split.",
)
@click.option(
    "--profile",
    metavar="FIRST-LAST",
    help="Profile these steps, counted from 1, and write the trace to the folder profile/ of the run.",
)
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
    """Pretrain a model.

    RECIPE is the name of a preset or a YAML file. The same command resumes an interrupted run.
    """
    loaded = load_recipe(recipe, fields)
    if dry_run:
        from ijepa.planning.text import render_size

        source = open_images(loaded.data.path) if loaded.data.path else None
        click.echo(render_size(loaded, len(source) if source else None))
        return
    if loaded.data.path is None:
        raise UserError("data.path", "no data given", "add --data.path with images or tar shards")
    from ijepa.interop.init_from import initial_weights
    from ijepa.training.loop import pretrain as run
    from ijepa.training.profiler import Window

    window = Window.parse(profile) if profile else None
    source = open_images(loaded.data.path)
    info = {"data": {"path": _shown(loaded.data.path)}}
    folder = output or Path("runs") / loaded.name
    initial = initial_weights(loaded)
    loaded = initial.recipe if initial else loaded
    callback = _diagnosis(loaded, len(source), diagnose_every, diagnose_data, folder)
    run(
        loaded,
        source,
        folder,
        resume=resume,
        callbacks=callback,
        info={**info, **({"init": initial.label} if initial else {})},
        profile=window,
        initial=initial.tensors if initial else None,
    )
    if first_process():
        click.echo(f"done: {folder}")


def _shown(path: str) -> str:
    """Return a data path as a run records it: absolute, except for URLs and `hf:` paths."""
    return path if "://" in path or path.startswith("hf:") else str(Path(path).resolve())


_LEAST, _MOST = 50, 5000
"""Limits of the default number of steps between measurements: short runs must not spend much of their time on them, and
in long runs a problem should be visible within an hour."""


def _diagnosis(recipe: Recipe, images: int, every: int | None, data: str | None, folder: Path) -> Sequence[Any]:
    """Return the callback that measures the target encoder on fixed images during the run, and warns of problems."""
    from ijepa.data.open import open_dataset
    from ijepa.evaluation.diagnostics.online import online_diagnosis
    from ijepa.evaluation.diagnostics.warnings import new_training_warnings
    from ijepa.training.loop import Callback

    where = "data.path" if data is None else "--diagnose-data"
    try:
        held_out = open_dataset(data or str(recipe.data.path), where=where, split="val")
    except UserError as error:
        if data is not None:
            raise
        held_out = open_images(str(recipe.data.path))
        if first_process():
            click.echo(f"diagnostics are measured on training images: {error}")
    total = recipe.lengths(images).total
    every = min(total, max(_LEAST, min(_MOST, total // 10))) if every is None else every
    return [
        Callback(every or total, online_diagnosis(held_out, recipe.model.image_size), new_training_warnings(folder))
    ]


@click.command(cls=RecipeCommand, epilog=_EPILOG)
@click.argument("recipe")
@click.option("--gpu", default="h100", metavar="NAME", help="Type of GPU: a100, h100, h200 or b200.")
@click.option("--gpus", type=int, default=8, help="Number of GPUs. It must divide batch.global.")
@click.option(
    "--images-per-second",
    type=float,
    metavar="X",
    help="Throughput of all GPUs together. Default: an estimate from --share-of-peak.",
)
@click.option(
    "--share-of-peak",
    type=float,
    default=0.35,
    metavar="X",
    help="Share of the GPU's dense bf16 peak that the run reaches, counted in executed operations.",
)
@click.option(
    "--country", default="World", metavar="NAME", help="Country whose electricity mix gives the CO2 estimate."
)
@click.option("--json", "file", type=PATH, metavar="FILE", help="Also write all figures to this file.")
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
    """Estimate the cost of a run.

    Prints the model size, FLOPs, memory per GPU, days, energy and CO2 of RECIPE (the name of a preset or a YAML file)
    on the given hardware. It needs no GPU.
    """
    from ijepa.planning.plan import make_plan
    from ijepa.planning.text import render_plan
    from ijepa.utils.files import write_errors, write_json

    loaded = load_recipe(recipe, fields)
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"--json {file}", f"{file.parent} is not a folder")
    source = open_images(loaded.data.path) if loaded.data.path else None
    found = make_plan(
        loaded,
        gpu=gpu,
        devices=gpus,
        images_per_second=images_per_second,
        share_of_peak=share_of_peak,
        country=country,
        images=len(source) if source else None,
    )
    click.echo(render_plan(found), nl=False)
    if file is not None:
        with write_errors(file):
            write_json(file, found.as_json())
        click.echo(f"plan: {file}")


@click.command()
@click.option("--output", type=PATH, default=Path("runs/demo"), help="Run folder.")
@click.option("--seed", type=NOT_NEGATIVE, default=0, help="Seed of the whole demo.")
@debug_option
def demo(output: Path, seed: int) -> None:
    """Run a complete example.

    It generates the built-in scenes, pretrains on them, evaluates the encoder and writes a report.
    """
    from ijepa.demo import run

    run(output, seed=seed)
