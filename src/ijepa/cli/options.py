"""What several commands share: the fields of the recipe as flags, --debug, progress lines, opening images."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click

from ijepa.config.recipe import Recipe
from ijepa.utils.errors import UserError
from ijepa.utils.progress import Progress
from ijepa.utils.quantities import Duration

PATH = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
NOT_NEGATIVE = click.IntRange(min=0)

WEIGHTS_HELP = (
    "WEIGHTS is one of: a run folder, a checkpoint folder, a weights folder, an archive, a model folder of "
    "transformers or timm, a .pth.tar file of the original I-JEPA code, a .safetensors file, or the name of weights "
    "that are included in ijepa (scenes)."
)


class RecipeCommand(click.Command):
    """A command whose options are every field of the recipe, listed by section in its help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key, annotation, text, default in Recipe.iter_fields():
            help_ = text if default in (None, "") else f"{text}  [default: {_typed(default)}]"
            metavar = _metavar(annotation)
            self.params.append(click.Option([f"--{key}", identifier(key)], metavar=metavar, help=help_, default=None))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List options under the section that they belong to."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and isinstance(param, click.Option):
                name = (param.name or "").replace("__", ".")
                dotted = any(name == key for key, *_ in Recipe.iter_fields())
                head = "Options" if not dotted else f"Recipe: {name.rpartition('.')[0] or 'run'}"
                groups.setdefault(head, []).append(record)
        for head in sorted(groups, key=lambda head: (head != "Options", head != "Recipe: run")):
            with formatter.section(head):
                formatter.write_dl(groups[head])


def identifier(key: str) -> str:
    """Return the name by which click passes the value of a dotted key."""
    return key.replace(".", "__")


def _metavar(annotation: Any) -> str:
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _metavar(parts[0])
    if get_origin(annotation) is Literal:
        return "|".join(parts)
    if get_origin(annotation) is tuple:
        return "HEIGHT,WIDTH" if parts[0] is int else "LOW,HIGH"
    if parts:
        return "|".join(_metavar(part) for part in parts if part is not type(None))
    return {int: "N", float: "X", bool: "BOOL", Duration: "LENGTH"}.get(annotation, "TEXT")


def _typed(value: Any) -> str:
    """Return a value in the form in which it is typed after a flag."""
    if isinstance(value, tuple):
        return ",".join(map(_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def load_recipe(name_or_path: str, fields: dict[str, str | None]) -> Recipe:
    """Load a recipe and apply the flags that were given; `none` clears an optional field.

    Raises:
        UserError: names the flag at fault, or the file and its key.
    """
    typed = {key: value for key, *_ in Recipe.iter_fields() if (value := fields[identifier(key)]) is not None}
    optional = {key for key, annotation, *_ in Recipe.iter_fields() if type(None) in get_args(annotation)}
    clears = {key for key, value in typed.items() if key in optional and value.lower() in ("none", "null")}
    try:
        return Recipe.load(name_or_path, {key: None if key in clears else value for key, value in typed.items()})
    except UserError as error:
        for key, value in typed.items():
            if f": {key} = " in error.where:
                raise UserError(f"--{key} {value}", error.problem, error.hint) from None
        raise


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --debug, which `ijepa.__main__` reads: errors show their traceback."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(command)


def heads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --heads, for weights that do not state the number of attention heads."""
    text = (
        "Number of attention heads of the encoder, if the weights do not state it. Default: the number of a known "
        "model of the same width, or a guess."
    )
    return click.option("--heads", type=POSITIVE, help=text)(command)


def open_images(path: str, where: str = "data.path") -> Any:
    """Open the images at `path`; `where` is the key or flag that an error names."""
    from ijepa.data.open import open_dataset

    return open_dataset(path, where=where, split="train")


def first_process() -> bool:
    """Whether this process prints: the only one, or the first rank under torchrun."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress_lines() -> Iterator[Progress]:
    """Yield a callback that shows progress on the error stream: one changing line on a terminal, else plain lines."""
    if not sys.stderr.isatty():
        yield partial(click.echo, err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update
