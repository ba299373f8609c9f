"""The commands. This file alone knows all rooms; heavy ones are imported when their command runs.

Every field of a recipe is a dotted flag of `ijepa pretrain`; the flags, their help and their checks all come from the
recipe's own types, so that a new field needs nothing here.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ijepa import __version__
from ijepa.errors import Refused
from ijepa.recipe import Recipe, presets
from ijepa.section import Section, section_of


class RecipeCommand(click.Command):
    """A command whose options are every field of the recipe, listed by section in its help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key, annotation, text in Recipe.leaves():
            metavar = _metavar(annotation)
            self.params.append(click.Option([f"--{key}", key], metavar=metavar, help=text, default=None))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List options under the section that they belong to."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record:
                name = param.name or ""
                dotted = any(name == key for key, _, _ in Recipe.leaves())
                head = "Options" if not dotted else f"Recipe: {name.rpartition('.')[0] or 'run'}"
                groups.setdefault(head, []).append(record)
        for head in sorted(groups, key=lambda head: (head != "Options", head != "Recipe: run")):
            with formatter.section(head):
                formatter.write_dl(groups[head])


def _metavar(annotation: Any) -> str:
    words = str(annotation)
    for part, name in (("Length", "LENGTH"), ("tuple", "LOW,HIGH"), ("int", "N"), ("float", "X"), ("bool", "BOOL")):
        if part in words:
            return name
    return "WORD"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ijepa")
def cli() -> None:
    """I-JEPA: pretrain by a recipe, evaluate by the field's protocols, see what was learned."""


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --debug, which `ijepa.__main__` reads: errors keep their traceback."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")(command)


@cli.command(cls=RecipeCommand, epilog="Presets: " + ", ".join(presets()))
@click.argument("recipe")
@click.option("--output", type=click.Path(path_type=Path), help="The run's folder; runs/NAME if not given.")
@click.option("--resume", type=click.Choice(["auto", "never"]), default="auto", show_default=True,
              help="auto goes on with the run in the folder; never refuses a folder that holds one.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and its cost; write nothing.")
@click.option("--diagnose-every", type=click.IntRange(min=0), default=0, metavar="N",
              help="Measure RankMe, std and position R^2 every N steps; 0 only at the start and the end.")
@debug_option
def pretrain(recipe: str, output: Path | None, resume: str, dry_run: bool, diagnose_every: int, **fields: Any) -> None:
    """Pretrain by RECIPE, a preset's name or a YAML file; the same command resumes."""
    overrides = {key: value for key, value in fields.items() if value is not None}
    loaded = Recipe.load(recipe, _typed(overrides))
    if dry_run:
        from ijepa.plan import describe

        source = _source(loaded.data.path) if loaded.data.path else None
        click.echo(describe(loaded, len(source) if source else None))
        return
    if loaded.data.path is None:
        raise Refused("data.path", "no data given", "add --data.path with images or tar shards")
    from ijepa.training.loop import pretrain as run

    source = _source(loaded.data.path)
    callback = _diagnosis(loaded, source, diagnose_every)
    info = {"data": {"path": str(Path(loaded.data.path).resolve()), "fingerprint": source.fingerprint}}
    folder = output or Path("runs") / loaded.name
    run(loaded, source, folder, resume=resume == "auto", callbacks=callback, info=info)
    click.echo(f"done: {folder}")


def _typed(overrides: dict[str, str]) -> dict[str, Any]:
    """`none` clears an optional field; everything else is for the recipe's own types to read."""
    optional = {key for key, annotation, _ in Recipe.leaves() if "None" in str(annotation)}
    return {k: None if k in optional and v.lower() in ("none", "null") else v for k, v in overrides.items()}


def _source(path: str, where: str = "data.path") -> Any:
    from ijepa.data.sources import open_source

    return open_source(path, where=where, split="train")


def _diagnosis(recipe: Recipe, source: Any, every: int) -> Sequence[Any]:
    """Return the callback that measures the target encoder on a fixed batch on the way."""
    from ijepa.evaluation.monitoring import online_diagnosis
    from ijepa.training.loop import Callback

    total = recipe.lengths(len(source)).total
    return [Callback(every or total, online_diagnosis(source, recipe.model.image_hw))]


@cli.group()
def evaluate() -> None:
    """Say how good an encoder is, by one protocol, with its result as JSON."""


@cli.group()
def data() -> None:
    """Make, convert, index and verify data sets."""


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
    click.echo(f"{out}: {', '.join(f'{count} {split}' for split, count in _counts(made).items())}")
