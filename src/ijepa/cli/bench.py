"""`ijepa bench`: measure this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ijepa.cli.options import RecipeCommand, debug_option, load_recipe
from ijepa.config.recipe import Recipe
from ijepa.utils.errors import Refused


@click.group()
def bench() -> None:
    """Measure this machine; results are JSON, ratios from interleaved runs."""


def bench_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --output for the JSON of a measurement."""
    option = click.option("--output", type=click.Path(path_type=Path), help="File for the result as JSON.")
    return option(debug_option(command))


@bench.command("data")
@click.option("--data.path", "path", required=True, help="Images to read.")
@click.option("--recipe", default="vit-huge-16-in22k", show_default=True, help="Whose crops and masks are made.")
@click.option("--images", type=click.IntRange(min=1), default=280, show_default=True, help="How many of them.")
@click.option("--micro", type=click.IntRange(min=1), default=128, show_default=True, help="Images of a micro-batch.")
@click.option("--repeats", type=click.IntRange(min=1), default=12, show_default=True, help="Interleaved rounds.")
@bench_output
def bench_data(path: str, recipe: str, images: int, micro: int, repeats: int, output: Path | None) -> None:
    """Reading, decoding and cropping beside the usual PIL pipeline, in images per CPU-second."""
    from ijepa.bench.data import bench_data as run

    _keep(run(path, Recipe.load(recipe), images=images, micro=micro, repeats=repeats, echo=click.echo), output)


@bench.command("step", cls=RecipeCommand)
@click.argument("recipe")
@click.option("--count", type=click.IntRange(min=1), default=5, show_default=True, help="Steps to measure.")
@bench_output
def bench_step(recipe: str, count: int, output: Path | None, **fields: Any) -> None:
    """One training step of RECIPE on random pixels, by parts, beside what the machine's matrix products reach."""
    from ijepa.bench import bench_step as run

    loaded = load_recipe(recipe, fields)
    micro = loaded.batch.micro
    _keep(run(loaded, micro=16 if micro == "auto" else micro, steps=count, threads=None, echo=click.echo), output)


@bench.command("index")
@click.option("--images", "sizes", default="250000,1000000", show_default=True, metavar="N,N", help="Two sizes.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Where the shards are made, then removed.")
@bench_output
def bench_index(sizes: str, folder: Path | None, output: Path | None) -> None:
    """Indexing shards of two sizes, and what that gives for ImageNet-22k."""
    from ijepa.bench import bench_index as run

    try:
        images = [int(size) for size in sizes.split(",")]
    except ValueError:
        images = []
    if not images or min(images) < 1 or images != sorted(set(images)):
        raise Refused(f"--images {sizes}", "is no list of rising numbers", "write --images 250000,1000000")
    _keep(run(images=images, folder=folder, echo=click.echo), output)


@bench.command("order")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Where the index is made, then removed.")
@bench_output
def bench_order(folder: Path | None, output: Path | None) -> None:
    """Finding any step of ImageNet-22k's order, and walking an epoch of it."""
    from ijepa.bench import bench_order as run

    _keep(run(folder=folder, echo=click.echo), output)


@bench.command("masks")
@bench_output
def bench_masks(output: Path | None) -> None:
    """Drawing the masks of 256 images."""
    from ijepa.bench import bench_masks as run

    _keep(run(echo=click.echo), output)


@bench.command("attention")
@bench_output
def bench_attention(output: Path | None) -> None:
    """Packed attention beside a loop, padding, and torch's own kernel."""
    from ijepa.bench import bench_attention as run

    _keep(run(echo=click.echo), output)


@bench.command("evaluation")
@click.option(
    "--part",
    "parts",
    type=click.Choice(["forward", "cached", "knn", "bank"]),
    multiple=True,
    help="Measure only this; may be given several times.",
)
@click.option("--recipe", default="vit-small-16", show_default=True, help="Whose encoder stands before the heads.")
@click.option("--images", type=click.IntRange(min=1), default=32, show_default=True, help="Its batch.")
@click.option(
    "--knn-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    help="Of 1.28 M features of width 1280 and 50,000 queries.",
)
@click.option(
    "--bank-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Of a bank of 1 M patches of width 384.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Interleaved rounds.")
@bench_output
def bench_evaluation(parts: tuple[Any, ...], output: Path | None, **options: Any) -> None:
    """Many heads beside one, kNN and a retrieval bank at full size: seconds of CPU, memory, recall."""
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
