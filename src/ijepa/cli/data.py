"""`ijepa data`: make and index data sets."""

from pathlib import Path

import click

from ijepa.cli.options import debug_option


@click.group()
def data() -> None:
    """Make and index data sets."""


@data.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--images", type=int, default=12000, show_default=True, help="How many scenes, both splits together.")
@click.option("--seed", type=int, default=0, show_default=True, help="All drawing comes from it.")
@click.option("--size", type=int, default=64, show_default=True, help="Side of a scene in pixels.")
@click.option("--val-share", type=float, default=1 / 6, show_default="1/6", help="Share of scenes for validation.")
@click.option("--processes", type=int, default=1, show_default=True, help="Drawing processes; bytes do not change.")
@debug_option
def scenes(out: Path, images: int, seed: int, size: int, val_share: float, processes: int) -> None:
    """Draw the built-in data set into OUT, as tar shards with labels and masks."""
    from ijepa.prepare.scenes import write_scenes

    made = write_scenes(out, images=images, seed=seed, size=size, val_share=val_share, processes=processes)
    click.echo(f"{out}: " + ", ".join(f"{part['images']} {split}" for split, part in made["splits"].items()))


@data.command()
@click.argument("path")
@click.option("--split", default=None, help="train, val or test, where the folder holds several.")
@debug_option
def index(path: str, split: str | None) -> None:
    """Index PATH, or check its index, and say what it holds."""
    from ijepa.data.sources import open_source

    source = open_source(path, where="PATH", split=split)
    labels = "no labels" if source.labels is None else f"{len(set(source.labels.tolist()))} classes"
    click.echo(f"{path}: {len(source)} images, {labels}, {'masks' if source.has_masks else 'no masks'}")


@data.command()
@click.argument("path")
@click.option("--split", default=None, help="train, val or test, where the folder holds several.")
@click.option("--duplicates", is_flag=True, help="Also list images whose files are equal.")
@click.option("--processes", type=int, default=1, show_default=True, help="Decoding processes.")
@debug_option
def check(path: str, split: str | None, duplicates: bool, processes: int) -> None:
    """Decode every image of PATH; list the bad ones, and end with exit code 1 if there are any."""
    from ijepa.cli.options import telling
    from ijepa.data.sources import open_source
    from ijepa.errors import Failed
    from ijepa.prepare.check import check as run

    source = open_source(path, where="PATH", split=split)
    with telling() as progress:
        found = run(source, duplicates=duplicates, processes=processes, progress=progress)
    click.echo("\n".join(found.lines()))
    if found.bad:
        raise Failed(f"{path}: {len(found.bad)} of {found.images} images are bad")
