"""`ijepa data`: make, pack, index and check data sets."""

from pathlib import Path

import click

from ijepa.cli.options import debug_option, telling
from ijepa.utils.errors import Refused


@click.group()
def data() -> None:
    """Make, pack, index and check data sets."""


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
    from ijepa.prepare.scenes.scenes import write_scenes

    made = write_scenes(out, images=images, seed=seed, size=size, val_share=val_share, processes=processes)
    click.echo(f"{out}: " + ", ".join(f"{part['images']} {split}" for split, part in made["splits"].items()))


@data.command()
@click.argument("path")
@click.option("--split", default=None, help="train, val or test, where the folder holds several.")
@debug_option
def index(path: str, split: str | None) -> None:
    """Index PATH, or check its index, and say what it holds."""
    from ijepa.data.open import open_source

    source = open_source(path, where="PATH", split=split)
    labels = "no labels" if source.labels is None else f"{len(set(source.labels.tolist()))} classes"
    click.echo(f"{path}: {len(source)} images, {labels}, {'masks' if source.has_masks else 'no masks'}")


@data.command()
@click.argument("path")
@click.option("--split", default=None, help="train, val or test, where the folder holds several.")
@click.option("--duplicates", is_flag=True, help="Also list images whose files are equal.")
@click.option("--checksums", is_flag=True, help="Only compare the shards with their manifest's SHA-256.")
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Decoding processes.")
@debug_option
def check(path: str, split: str | None, duplicates: bool, checksums: bool, processes: int) -> None:
    """Decode every image of PATH; list the bad ones, and end with exit code 1 if there are any."""
    from ijepa.data.open import open_source
    from ijepa.prepare.checksums import changed_shards
    from ijepa.prepare.verify import check as run
    from ijepa.utils.errors import Failed

    if checksums:
        with telling() as progress:
            count, lines = changed_shards(Path(path).expanduser(), split, threads=processes, tell=progress)
        click.echo("\n".join([f"{count} shards: {count - len(lines)} as packed, {len(lines)} not", *lines]))
        if lines:
            raise Failed(f"{path}: {len(lines)} of {count} shards are not as they were packed")
        return
    source = open_source(path, where="PATH", split=split)
    with telling() as progress:
        found = run(source, duplicates=duplicates, processes=processes, progress=progress)
    click.echo("\n".join(found.lines()))
    if found.bad:
        raise Failed(f"{path}: {len(found.bad)} of {found.images} images are bad")


@data.command()
@click.argument("kind", type=click.Choice(["imagenet22k", "imagenet1k", "folder", "list"]))
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--devkit", type=click.Path(path_type=Path), help="ImageNet-1K's development kit, for validation classes."
)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    help="Which to pack where a folder holds several; else what to call the images.",
)
@click.option("--hold-out", type=click.IntRange(min=0), default=0, show_default=True, help="Images a class for val.")
@click.option("--shard-size", type=click.IntRange(min=1), default=3000, show_default=True, help="Images a shard.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the shuffle.")
@click.option("--max-side", type=click.IntRange(min=1), help="Make larger images smaller; else every byte is kept.")
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Bytes do not change.")
@debug_option
def pack(
    kind: str,
    paths: tuple[Path, ...],
    devkit: Path | None,
    split: str | None,
    hold_out: int,
    shard_size: int,
    seed: int,
    max_side: int | None,
    processes: int,
) -> None:
    """Pack PATHS (archives as downloaded, a folder, a list of paths and labels) into shards; the last path is OUT."""
    from ijepa.data.sources.base import Source
    from ijepa.prepare.archives import open_archives
    from ijepa.prepare.pack import Settings
    from ijepa.prepare.pack import pack as run

    *sources, out = paths
    if not sources:
        raise Refused("OUT", "is missing", f"write `ijepa data pack {kind} SOURCE OUT`")
    settings = Settings(seed, shard_size, hold_out, max_side)
    for path in sources:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise Refused(out, f"lies in {path}, whose images are to be packed", "give a folder outside it")
    with telling() as tell:

        def opened(spool: Path) -> dict[str, Source]:
            return open_archives(kind, sources, spool, devkit, tell, split)

        made = run(opened, out, settings, processes=processes, tell=tell)
    shown = ", ".join(f"{part['images']} {name} in {len(part['shards'])}" for name, part in made["splits"].items())
    click.echo(
        f"{out}: {shown} shards; {made['bad']} bad" + (f", listed in {out / 'bad.jsonl'}" if made["bad"] else "")
    )
