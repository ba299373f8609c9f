"""`ijepa data`: make, pack, index and check data sets."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ijepa.cli.options import NOT_NEGATIVE, PATH, POSITIVE, debug_option, progress_lines
from ijepa.utils.errors import RunError, UserError

if TYPE_CHECKING:
    from ijepa.prepare.verify import CheckResult


@click.group()
def data() -> None:
    """Make, pack, index and check data sets."""


@data.command()
@click.argument("out", type=PATH)
@click.option("--images", type=int, default=12000, help="Number of scenes, both splits together.")
@click.option("--seed", type=int, default=0, help="Seed of all scenes.")
@click.option("--size", type=int, default=64, help="Side length of a scene in pixels.")
@click.option(
    "--val-share", type=float, default=1 / 6, show_default="1/6", help="Share of the scenes in the validation split."
)
@click.option("--processes", type=int, default=1, help="Number of processes. The output does not depend on it.")
@debug_option
def scenes(out: Path, images: int, seed: int, size: int, val_share: float, processes: int) -> None:
    """Generate the built-in data set.

    The scenes are written to the folder OUT as tar shards with labels and masks.
    """
    from ijepa.prepare.scenes.scenes import write_scenes

    made = write_scenes(out, images=images, seed=seed, size=size, val_share=val_share, processes=processes)
    click.echo(f"{out}: " + ", ".join(f"{part['images']} {split}" for split, part in made["splits"].items()))


@data.command()
@click.argument("path")
@click.option("--split", help="Which split to read if PATH contains several: train, val or test.")
@debug_option
def index(path: str, split: str | None) -> None:
    """Index a data set.

    Creates the index of PATH, or checks an existing one, and prints the number of images and classes.
    """
    from ijepa.data.open import open_dataset

    source = open_dataset(path, where="PATH", split=split)
    labels = "no labels" if source.labels is None else f"{len(set(source.labels.tolist()))} classes"
    click.echo(f"{path}: {len(source)} images, {labels}, {'masks' if source.has_masks else 'no masks'}")


@data.command()
@click.argument("path")
@click.option("--split", help="Which split to read if PATH contains several: train, val or test.")
@click.option("--duplicates", is_flag=True, help="Also list images whose files are identical.")
@click.option(
    "--checksums",
    is_flag=True,
    help="Only compare the shards with the SHA-256 checksums in their manifest. Decode nothing.",
)
@click.option("--processes", type=POSITIVE, default=1, help="Number of processes.")
@debug_option
def check(path: str, split: str | None, duplicates: bool, checksums: bool, processes: int) -> None:
    """Decode every image and list the bad ones.

    The exit code is 1 if an image of PATH is bad.
    """
    from ijepa.data.open import open_dataset
    from ijepa.prepare.verify import changed_shards
    from ijepa.prepare.verify import check as run

    if checksums:
        with progress_lines() as progress:
            count, lines = changed_shards(Path(path).expanduser(), split, threads=processes, progress=progress)
        click.echo("\n".join([f"{count} shards: {count - len(lines)} match the manifest, {len(lines)} do not", *lines]))
        if lines:
            raise RunError(f"{path}: {len(lines)} of {count} shards do not match the manifest")
        return
    source = open_dataset(path, where="PATH", split=split)
    with progress_lines() as progress:
        found = run(source, duplicates=duplicates, processes=processes, progress=progress)
    click.echo("\n".join(_check_lines(found)))
    if found.bad:
        raise RunError(f"{path}: {len(found.bad)} of {found.images} images are bad")


def _check_lines(result: "CheckResult", width: int = 40) -> Iterator[str]:
    """Yield the totals, a histogram of the shorter side, and every bad image and duplicate."""
    from ijepa.prepare.verify import SIDES

    bad = len(result.bad)
    yield f"{result.images} images, {result.bytes / 1e9:.3f} GB: {result.images - bad} good, {bad} bad"
    yield "shorter side in pixels"
    spans = [f"{low}-{high - 1}" for low, high in pairwise(SIDES)] + [f"{SIDES[-1]} and more"]
    for span, count in zip(spans, result.sides, strict=True):
        if count:
            yield f"{span:>13} {count:>9} {'#' * max(1, round(width * count / max(result.sides)))}"
    yield from (f"bad: {name}: {why}" for name, why in result.bad)
    yield from (f"duplicate: {name} is identical to {first}" for name, first in result.duplicates)


@data.command()
@click.argument("kind", type=click.Choice(["imagenet22k", "imagenet1k", "folder", "list"]))
@click.argument("paths", nargs=-1, required=True, type=PATH)
@click.option(
    "--devkit", type=PATH, help="Development kit of ImageNet-1K, which contains the classes of the validation images."
)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    help="Which split to pack if a folder contains several. Otherwise: the name of the split to write.",
)
@click.option(
    "--hold-out", type=NOT_NEGATIVE, default=0, help="Number of images per class to move to the validation split."
)
@click.option("--shard-size", type=POSITIVE, default=3000, help="Images per shard.")
@click.option("--seed", type=NOT_NEGATIVE, default=0, help="Seed of the shuffle.")
@click.option(
    "--max-side",
    type=POSITIVE,
    help="Longest side in pixels. Larger images are resized. Default: copy all files unchanged.",
)
@click.option("--processes", type=POSITIVE, default=1, help="Number of processes. The output does not depend on it.")
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
    """Pack images into tar shards.

    PATHS are one or more sources, and the output folder as the last path. A source is an archive as downloaded
    (imagenet22k, imagenet1k), a folder of images (folder), or a file with paths and labels (list).
    """
    from ijepa.data.sources.base import Source
    from ijepa.prepare.archives import open_archives
    from ijepa.prepare.pack import Settings
    from ijepa.prepare.pack import pack as run

    *sources, out = paths
    if not sources:
        raise UserError("OUT", "is missing", f"write `ijepa data pack {kind} SOURCE OUT`")
    settings = Settings(seed, shard_size, hold_out, max_side)
    for path in sources:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise UserError(out, f"is inside the source folder {path}", "choose a folder outside it")
    with progress_lines() as progress:

        def opened(spool: Path) -> dict[str, Source]:
            return open_archives(kind, sources, spool, devkit, progress, split)

        made = run(opened, out, settings, processes=processes, progress=progress)
    shown = ", ".join(f"{part['images']} {name} in {len(part['shards'])}" for name, part in made["splits"].items())
    click.echo(
        f"{out}: {shown} shards; {made['bad']} bad" + (f", listed in {out / 'bad.jsonl'}" if made["bad"] else "")
    )
