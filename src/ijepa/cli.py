"""The commands. This file alone knows all rooms; heavy ones are imported when their command runs.

Every field of a recipe is a dotted flag of `ijepa pretrain`; the flags, their help and their checks all come from the
recipe's own types, so that a new field needs nothing here.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from ijepa import __version__
from ijepa.errors import Failed, Refused
from ijepa.recipe import Recipe, presets


class RecipeCommand(click.Command):
    """A command whose options are every field of the recipe, listed by section in its help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key, annotation, text in Recipe.leaves():
            metavar = _metavar(annotation)
            self.params.append(click.Option([f"--{key}", _identifier(key)], metavar=metavar, help=text, default=None))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List options under the section that they belong to."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record:
                name = (param.name or "").replace("__", ".")
                dotted = any(name == key for key, _, _ in Recipe.leaves())
                head = "Options" if not dotted else f"Recipe: {name.rpartition('.')[0] or 'run'}"
                groups.setdefault(head, []).append(record)
        for head in sorted(groups, key=lambda head: (head != "Options", head != "Recipe: run")):
            with formatter.section(head):
                formatter.write_dl(groups[head])


def _identifier(key: str) -> str:
    return key.replace(".", "__")


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
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto goes on with the run in the folder; never refuses a folder that holds one.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and its cost; write nothing.")
@click.option(
    "--diagnose-every",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Measure RankMe, std and position R^2 every N steps; 0 only at the start and the end.",
)
@debug_option
def pretrain(recipe: str, output: Path | None, resume: str, dry_run: bool, diagnose_every: int, **fields: Any) -> None:
    """Pretrain by RECIPE, a preset's name or a YAML file; the same command resumes."""
    loaded = Recipe.load(recipe, _overrides(fields))
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
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"done: {folder}")


def _overrides(fields: dict[str, str | None]) -> dict[str, Any]:
    """Return the flags given, by dotted key; `none` clears an optional field, the recipe's types read the rest."""
    given = {key: fields[_identifier(key)] for key, _, _ in Recipe.leaves()}
    optional = {key for key, annotation, _ in Recipe.leaves() if "None" in str(annotation)}
    return {
        key: None if key in optional and value.lower() in ("none", "null") else value
        for key, value in given.items()
        if value is not None
    }


def _source(path: str, where: str = "data.path") -> Any:
    from ijepa.data.sources import open_source

    return open_source(path, where=where, split="train")


def _diagnosis(recipe: Recipe, source: Any, every: int) -> Sequence[Any]:
    """Return the callback that measures the target encoder on a fixed batch on the way."""
    from ijepa.evaluation.monitoring import online_diagnosis
    from ijepa.training.loop import Callback

    total = recipe.lengths(len(source)).total
    return [Callback(every or total, online_diagnosis(source, recipe.model.image_hw))]


WEIGHTS_HELP = "WEIGHTS is a run, a checkpoint folder, a weights folder, or the name of weights that come along."


def evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every evaluation takes."""
    options = (
        click.argument("weights"),
        click.option("--train", required=True, help="Labelled data to fit or look up in."),
        click.option("--test", required=True, help="Data that is scored."),
        click.option("--protocol", default=None, help="A protocol's name or a YAML file."),
        click.option(
            "--output", type=click.Path(path_type=Path), help="Folder for the result; the run's if not given."
        ),
        click.option("--which", type=click.Choice(["target", "context"]), default="target", show_default=True),
        click.option("--seed", type=int, default=0, show_default=True, help="Hold-out split and initial heads."),
        click.option(
            "--baselines/--no-baselines",
            default=True,
            show_default=True,
            help="Also evaluate the initial encoder and raw pixels.",
        ),
        debug_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@cli.group()
def evaluate() -> None:
    """Say how good an encoder is, by one protocol; the result is JSON with its protocol inside."""


@evaluate.command("linear", epilog=WEIGHTS_HELP)
@evaluation_options
def evaluate_linear(**options: Any) -> None:
    """Linear probe: heads on frozen features, chosen on a held-out part of train; test is read once."""
    _evaluate("linear", **options)


@evaluate.command("knn", epilog=WEIGHTS_HELP)
@evaluation_options
def evaluate_knn(**options: Any) -> None:
    """Nearest neighbours by cosine on pooled features."""
    _evaluate("knn", **options)


@evaluate.command("segmentation", epilog=WEIGHTS_HELP)
@evaluation_options
def evaluate_segmentation(**options: Any) -> None:
    """Segmentation: clusters that labels only score, dense nearest neighbours, or a linear layer; told by level."""
    _evaluate("segmentation", **options)


@evaluate.command("compare")
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option("--published/--no-published", default=True, show_default=True, help="Add published figures beside.")
@debug_option
def evaluate_compare(results: tuple[Path, ...], published: bool) -> None:
    """Put RESULTS (JSON files of evaluations) into one table, a column for each protocol and data."""
    from ijepa.evaluation.comparison import compare_results

    click.echo(compare_results(results, beside=published))


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Tell how far long work has got, on the error stream: one living line on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield partial(click.echo, err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update


def _evaluate(
    kind: str,
    *,
    weights: str,
    train: str,
    test: str,
    protocol: str | None,
    output: Path | None,
    which: Any,
    seed: int,
    baselines: bool,
) -> None:
    from ijepa.evaluation.run import evaluate as run
    from ijepa.evaluation.run import table

    with telling() as tell:
        result, file = run(
            kind,
            weights,
            train,
            test,
            protocol=protocol,
            which=which,
            seed=seed,
            baselines=baselines,
            output=output,
            progress=tell,
        )
    click.echo(table(result))
    click.echo(f"result: {file}")


@cli.command(epilog=WEIGHTS_HELP)
@click.argument("weights")
@click.option("--data", "path", required=True, help="Images to look at; labels are not used.")
@click.option("--images", type=click.IntRange(min=16), default=512, show_default=True, help="How many of them.")
@click.option("--which", type=click.Choice(["target", "context"]), default="target", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the images.")
@click.option("--layers/--no-layers", default=False, show_default=True, help="Also every block by itself.")
@click.option(
    "--views", type=click.IntRange(min=0), default=10, show_default=True, help="Of an image, for LiDAR; 0: none."
)
@debug_option
def diagnose(weights: str, path: str, images: int, which: Any, seed: int, layers: bool, views: int) -> None:
    """Diagnose an encoder without labels: rank, spread, what position explains, and a verdict.

    Of a run, its figures on the way are read too, and warned of where they say together what none says alone.
    """
    import json

    from ijepa.evaluation.layers import diagnose_fully as run
    from ijepa.evaluation.trends import run_warnings
    from ijepa.interop.weights import load_encoder, resolve_weights

    resolved = resolve_weights(weights)
    found = run(
        load_encoder(weights, which),
        _source(path, "--data"),
        images=images,
        image_size=resolved.recipe.model.image_hw,
        seed=seed,
        rule=resolved.recipe.mask,
        views=views,
        layers=layers,
    )
    found["warnings"] = run_warnings(resolved.run) if resolved.run else []
    click.echo(json.dumps(found, indent=1))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", "path", default=None, help="Images for the pictures, where the run's own are elsewhere now.")
@debug_option
def report(run: Path, path: str | None) -> None:
    """Write RUN/report.html: one page with curves, pictures and tables, which needs no network."""
    from ijepa.report.page import write_report

    click.echo(f"report: {write_report(run, data=path)}")


@cli.command(cls=RecipeCommand, epilog="Presets: " + ", ".join(presets()))
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
    from ijepa.files import write_json
    from ijepa.plan import outlook
    from ijepa.planning.page import show

    loaded = Recipe.load(recipe, _overrides(fields))
    if file is not None and not file.absolute().parent.is_dir():
        raise Refused(f"--json {file}", f"{file.parent} is no folder")
    source = _source(loaded.data.path) if loaded.data.path else None
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


@cli.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="The run's folder."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Scenes, weights, masks: all.")
@debug_option
def demo(output: Path, seed: int) -> None:
    """Go the whole journey on the built-in scenes: data, pretraining, evaluation, report."""
    from ijepa.demo import run

    run(output, seed=seed)


@cli.group()
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


@cli.group()
def bench() -> None:
    """Measure this machine; results are JSON, ratios from interleaved runs."""


def bench_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --output for the JSON of a measurement."""
    option = click.option("--output", type=click.Path(path_type=Path), help="File for the result as JSON.")
    return option(debug_option(command))


@bench.command("data")
@click.option("--data.path", "path", required=True, help="Images to read.")
@click.option("--images", type=click.IntRange(min=1), default=280, show_default=True, help="How many of them.")
@click.option("--repeats", type=click.IntRange(min=1), default=4, show_default=True, help="Interleaved rounds.")
@bench_output
def bench_data(path: str, images: int, repeats: int, output: Path | None) -> None:
    """Reading, decoding and cropping beside the usual PIL pipeline, in images per CPU-second."""
    from ijepa.data.bench import bench_data as run

    _keep(run(path, images=images, repeats=repeats, echo=click.echo), output)


@bench.command("step", cls=RecipeCommand)
@click.argument("recipe")
@click.option("--count", type=click.IntRange(min=1), default=5, show_default=True, help="Steps to measure.")
@bench_output
def bench_step(recipe: str, count: int, output: Path | None, **fields: Any) -> None:
    """One training step of RECIPE on random pixels, by parts, beside what the machine's matrix products reach."""
    from ijepa.bench import bench_step as run

    loaded = Recipe.load(recipe, _overrides(fields))
    micro = loaded.batch.micro
    _keep(run(loaded, micro=16 if micro == "auto" else micro, steps=count, threads=None, echo=click.echo), output)


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


def _keep(result: dict[str, Any], output: Path | None) -> None:
    from ijepa.files import write_json
    from ijepa.training.run import machine

    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {**machine(), **result})
        click.echo(f"result: {output}")
