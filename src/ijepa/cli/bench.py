"""`ijepa bench`: measure this machine."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ijepa.cli.options import PATH, POSITIVE, RecipeCommand, debug_option, load_recipe
from ijepa.config.recipe import Recipe


@click.group()
def bench() -> None:
    """Measure the speed of this machine.

    Results are printed, and written as JSON with --output. Methods that are compared take turns, so that other load on
    the machine affects all of them.
    """


def bench_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --output for the JSON of a measurement."""
    option = click.option("--output", type=PATH, help="File to write the result to, as JSON.")
    return option(debug_option(command))


@bench.command("data")
@click.option("--data.path", "path", required=True, help="Data set to read.")
@click.option("--recipe", default="vit-huge-16-in22k", help="Recipe that defines the crops and masks.")
@click.option("--images", type=POSITIVE, default=280, help="Number of images.")
@click.option("--micro", type=POSITIVE, default=128, help="Images per micro-batch.")
@click.option("--repeats", type=POSITIVE, default=12, help="Number of rounds. Each measures all methods.")
@bench_output
def bench_data(path: str, recipe: str, images: int, micro: int, repeats: int, output: Path | None) -> None:
    """Measure image loading.

    Compares decoding and cropping with the usual Pillow pipeline, in images per CPU-second, and measures the loader.
    """
    from ijepa.bench.data import bench_data as run

    _show(run(path, Recipe.load(recipe), images=images, micro=micro, repeats=repeats), _data_lines, output)


@bench.command("step", cls=RecipeCommand)
@click.argument("recipe")
@click.option("--count", type=POSITIVE, default=5, help="Number of steps to measure.")
@bench_output
def bench_step(recipe: str, count: int, output: Path | None, **fields: Any) -> None:
    """Measure the parts of a training step.

    Trains by RECIPE on random pixels, and compares the speed with that of plain matrix products on this machine.
    """
    from ijepa.bench.step import bench_step as run

    loaded = load_recipe(recipe, fields)
    micro = loaded.batch.micro
    _show(run(loaded, micro=16 if micro == "auto" else micro, steps=count), _step_lines, output)


@bench.command("masks")
@bench_output
def bench_masks(output: Path | None) -> None:
    """Measure drawing and packing the masks of 256 images."""
    from ijepa.bench.masks import bench_masks as run

    _show(run(), _masks_lines, output)


@bench.command("attention")
@bench_output
def bench_attention(output: Path | None) -> None:
    """Compare packed attention with a loop, with padding, and with PyTorch's own kernel."""
    from ijepa.bench.attention import bench_attention as run

    _show(run(), _attention_lines, output)


def _show(result: dict[str, Any], lines: Callable[[dict[str, Any]], Iterator[str]], output: Path | None) -> None:
    """Print a result, and write it with the machine's description to `output` if given."""
    from ijepa.utils.environment import machine
    from ijepa.utils.files import write_errors, write_json

    for line in lines(result):
        click.echo(line)
    if output is not None:
        with write_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, {**machine(), **result})
        click.echo(f"result: {output}")


def _data_lines(result: dict[str, Any]) -> Iterator[str]:
    if not result["jpeg_boxes"]:
        yield "JPEGs are decoded down to the crop's last row; with the extra turbojpeg, little more than the crop"
    rates, (height, width) = result["images_per_cpu_second"], result["image_size"]
    yield f"{result['images']} images to {height} x {width}, images per CPU-second:"
    for name, rate in rates.items():
        yield f"  {name:14s} {rate:8.1f}   {rate / rates['usual']:.2f} x"
    yield f"PSNR to the exact path: {result['psnr_mean']:.1f} dB, 1st percentile {result['psnr_percentile_1']:.1f} dB"
    yield "PSNR by percentile, dB: " + ", ".join(f"{q} %: {result[f'psnr_percentile_{q}']:.1f}" for q in (0, 1, 5, 50))
    by_workers = ", ".join(f"{n}: {rate:.0f}" for n, rate in result["images_per_second_by_workers"].items())
    yield f"images per second by number of loader processes (wall time): {by_workers}"
    yield f"loader's overhead over decode and resize: {100 * result['loader_overhead']:.1f} % of decode's time"
    yield f"cores for 4,200 images/s: {result['cores_for_4200_images_per_second']:.1f}"


def _step_lines(result: dict[str, Any]) -> Iterator[str]:
    seconds = result["seconds"]
    yield f"{result['recipe']}, {result['micro']} images per step, {result['threads']} threads, {result['dtype']}:"
    yield f"  {1e3 * seconds['total']:.2f} ms per image ({result['clock']}), wall {1e3 * result['wall']:.2f} ms"
    for part, value in seconds.items():
        if part != "total":
            yield f"    {part:18s} {1e3 * value:8.2f} ms  {100 * value / seconds['total']:4.1f} %"
    products = ", ".join(f"{name} {rate:.0f}" for name, rate in result["gemm"].items())
    yield f"  {result['gflop']:.1f} GFLOP per image, {result['gflops']:.0f} GFLOP/s; matrix products alone: {products}"
    yield f"  {100 * result['share']:.0f} % of the matrix products' rate; memory {result['memory'] / 2**30:.2f} GiB"


def _masks_lines(result: dict[str, Any]) -> Iterator[str]:
    height, width = result["grid"]
    masks, goal = result["masks_ms"], result["goal_ms"]
    yield f"{result['images']} images, {height} x {width} patches: masks {masks:.1f} ms of CPU (goal < {goal:.0f})"
    yield f"packing them for the model: {result['packing_ms']:.1f} ms"


def _attention_lines(result: dict[str, Any]) -> Iterator[str]:
    for each in result["results"]:
        shortest, longest = each["lengths"]
        yield f"{each['sequences']}, {each['count']} sequences of {shortest} to {longest} tokens, {each['dtype']}:"
        for name, ratio in each["ratio"].items():
            yield f"  {name:12s} {each['ms'][name]:8.1f} ms  {ratio:5.2f} x"
