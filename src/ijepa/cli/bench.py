"""`ijepa bench`: measure this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ijepa.cli.options import RecipeCommand, debug_option, load_recipe
from ijepa.config.recipe import Recipe
from ijepa.utils.errors import UserError


@click.group()
def bench() -> None:
    """Measure the speed of this machine.

    Results are printed, and written as JSON with --output. Methods that are compared run in turns, so that other load
    on the machine affects all of them.
    """


def bench_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --output for the JSON of a measurement."""
    option = click.option("--output", type=click.Path(path_type=Path), help="File to write the result to, as JSON.")
    return option(debug_option(command))


@bench.command("data")
@click.option("--data.path", "path", required=True, help="Data set to read.")
@click.option(
    "--recipe", default="vit-huge-16-in22k", show_default=True, help="Recipe that defines the crops and masks."
)
@click.option("--images", type=click.IntRange(min=1), default=280, show_default=True, help="Number of images.")
@click.option("--micro", type=click.IntRange(min=1), default=128, show_default=True, help="Images per micro-batch.")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Number of rounds. Each measures all methods.",
)
@bench_output
def bench_data(path: str, recipe: str, images: int, micro: int, repeats: int, output: Path | None) -> None:
    """Measure image loading.

    Compares decoding and cropping with the usual Pillow pipeline, in images per CPU-second, and measures the loader.
    """
    from ijepa.bench.data import bench_data as run

    _keep(run(path, Recipe.load(recipe), images=images, micro=micro, repeats=repeats, echo=click.echo), output)


@bench.command("step", cls=RecipeCommand)
@click.argument("recipe")
@click.option("--count", type=click.IntRange(min=1), default=5, show_default=True, help="Number of steps to measure.")
@bench_output
def bench_step(recipe: str, count: int, output: Path | None, **fields: Any) -> None:
    """Measure the parts of a training step.

    Trains by RECIPE on random pixels, and compares the speed with that of plain matrix products on this machine.
    """
    from ijepa.bench import bench_step as run

    loaded = load_recipe(recipe, fields)
    micro = loaded.batch.micro
    _keep(run(loaded, micro=16 if micro == "auto" else micro, steps=count, threads=None, echo=click.echo), output)


@bench.command("index")
@click.option(
    "--images",
    "sizes",
    default="250000,1000000",
    show_default=True,
    metavar="N,N",
    help="Data set sizes to measure, in images, in ascending order.",
)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Folder for the temporary shards.")
@bench_output
def bench_index(sizes: str, folder: Path | None, output: Path | None) -> None:
    """Measure indexing of tar shards.

    Indexes synthetic data sets of several sizes, and extrapolates CPU time and index size to ImageNet-22k.
    """
    from ijepa.bench import bench_index as run

    try:
        images = [int(size) for size in sizes.split(",")]
    except ValueError:
        images = []
    if not images or min(images) < 1 or images != sorted(set(images)):
        raise UserError(f"--images {sizes}", "is no list of rising numbers", "write --images 250000,1000000")
    _keep(run(images=images, folder=folder, echo=click.echo), output)


@bench.command("order")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Folder for the temporary index.")
@bench_output
def bench_order(folder: Path | None, output: Path | None) -> None:
    """Measure the shuffled image order.

    Jumps to steps of an order of the size of ImageNet-22k, and iterates over an epoch of it.
    """
    from ijepa.bench import bench_order as run

    _keep(run(folder=folder, echo=click.echo), output)


@bench.command("masks")
@bench_output
def bench_masks(output: Path | None) -> None:
    """Measure drawing and packing the masks of 256 images."""
    from ijepa.bench import bench_masks as run

    _keep(run(echo=click.echo), output)


@bench.command("attention")
@bench_output
def bench_attention(output: Path | None) -> None:
    """Compare packed attention with a loop, with padding, and with PyTorch's own kernel."""
    from ijepa.bench import bench_attention as run

    _keep(run(echo=click.echo), output)


@bench.command("evaluation")
@click.option(
    "--part",
    "parts",
    type=click.Choice(["forward", "cached", "knn", "bank"]),
    multiple=True,
    help="Measure only this part. The option can be repeated.",
)
@click.option(
    "--recipe", default="vit-small-16", show_default=True, help="Recipe that defines the encoder in front of the heads."
)
@click.option(
    "--images", type=click.IntRange(min=1), default=32, show_default=True, help="Images per batch of the encoder."
)
@click.option(
    "--knn-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    help="Size of the kNN measurement, as a share of 1.28 M features of width 1280 and 50,000 queries.",
)
@click.option(
    "--bank-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Size of the patch bank, as a share of 1 M patches of width 384.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of rounds. Each measures all methods.",
)
@bench_output
def bench_evaluation(parts: tuple[Any, ...], output: Path | None, **options: Any) -> None:
    """Measure the evaluation methods.

    Compares many linear heads with one, and measures kNN and a large patch bank: CPU seconds, memory and recall.
    """
    from ijepa.bench.evaluation import PARTS
    from ijepa.bench.evaluation import bench_evaluation as run

    _keep(run(parts=parts or PARTS, echo=click.echo, **options), output)


def _keep(result: dict[str, Any], output: Path | None) -> None:
    from ijepa.utils.environment import machine
    from ijepa.utils.files import write_json

    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {**machine(), **result})
        click.echo(f"result: {output}")
