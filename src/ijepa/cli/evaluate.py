"""`ijepa evaluate`, `diagnose` and `report`: how good an encoder is, and what it looks like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ijepa.cli.options import WEIGHTS_HELP, debug_option, first_process, heads_option, open_images, telling
from ijepa.utils.errors import Refused


def evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every evaluation on two labelled sets takes."""
    fitted = click.option("--train", required=True, help="Labelled data to fit or look up in.")
    return set_options(fitted(command))


def set_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every evaluation on labelled sets takes but the train set."""
    for option in (
        click.option("--test-list", default=None, help="The same of --test."),
        click.option("--train-list", default=None, help="File of image names: only these are taken of --train."),
        click.option("--test", required=True, help="Data that is scored."),
    ):
        command = option(command)
    return common_options(command)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every evaluation takes."""
    options = (
        click.argument("weights"),
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
        heads_option,
        click.option(
            "--autocast",
            type=click.Choice(["auto", "none", "bf16"]),
            default=None,
            help="Precision of the encoder: auto is bf16 on a GPU, none is float32; the protocol's if not given.",
        ),
        debug_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what evaluations on whole images take beside."""
    text = "ImageNet's development kit or Kaggle's table of validation classes, if not beside the images."
    return click.option("--devkit", default=None, help=text)(command)


class _Comparing(click.Group):
    """A group whose `--compare A B` is its command `compare A B`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--compare" in args:
            args = ["compare", *(word for word in args if word != "--compare")]
        return super().parse_args(ctx, args)


@click.group(cls=_Comparing)
@click.option("--compare", is_flag=True, expose_value=False, help="Put results into one table, as `compare` does.")
def evaluate() -> None:
    """Say how good an encoder is, by one protocol; the result is JSON with its protocol inside."""


@evaluate.command("linear", epilog=WEIGHTS_HELP)
@click.option(
    "--save-head",
    type=click.Path(path_type=Path),
    help="File for the best head on the last block, which `ijepa export --head` takes.",
)
@image_options
@evaluation_options
def evaluate_linear(**options: Any) -> None:
    """Linear probe: heads on frozen features, chosen on a held-out part of train; test is read once."""
    _evaluate("linear", **options)


@evaluate.command("knn", epilog=WEIGHTS_HELP)
@image_options
@evaluation_options
def evaluate_knn(**options: Any) -> None:
    """Nearest neighbours by cosine on pooled features."""
    _evaluate("knn", **options)


@evaluate.command("segmentation", epilog=WEIGHTS_HELP)
@click.option("--labels", default=None, help="Label map of the masks: a name or a YAML file; else the set's own.")
@set_options
@click.option("--train", default=None, help="Labelled data to fit or look up in; protocols of level 0 have none.")
def evaluate_segmentation(**options: Any) -> None:
    """Segmentation: clusters that labels only score, dense nearest neighbours, or a linear layer; told by level."""
    _evaluate("segmentation", **options)


@evaluate.command("propagation", epilog=WEIGHTS_HELP)
@click.option("--data", required=True, help="Labelled videos: a DAVIS tree, or images/NAME/* and masks/NAME/*.")
@common_options
def evaluate_propagation(data: str, **options: Any) -> None:
    """Carry the labels of videos' first frames on to the others; J and F, nothing trained."""
    from ijepa.evaluation.run import evaluate_videos as run

    with telling() as tell:
        result, file = run(options.pop("weights"), data, progress=tell, **options)
    _show(result, file)


@evaluate.command("compare")
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option("--published/--no-published", default=True, show_default=True, help="Add published figures beside.")
@debug_option
def evaluate_compare(results: tuple[Path, ...], published: bool) -> None:
    """Put RESULTS (JSON files of evaluations) into one table, a column for each protocol and data."""
    from ijepa.evaluation.results.compare import compare_results

    click.echo(compare_results(results, beside=published))


def _evaluate(
    kind: str,
    *,
    weights: str,
    train: str | None,
    test: str,
    protocol: str | None,
    output: Path | None,
    which: Any,
    seed: int,
    baselines: bool,
    heads: int | None,
    **data: Any,
) -> None:
    from ijepa.evaluation.run import evaluate as run

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
            heads=heads,
            output=output,
            progress=tell,
            **data,
        )
    _show(result, file)


def _show(result: dict[str, Any], file: Path) -> None:
    """Print a result; of several processes, the first does."""
    from ijepa.evaluation.run import table

    if first_process():
        click.echo(table(result))
        click.echo(f"result: {file}")


@click.command(epilog=WEIGHTS_HELP)
@click.argument("weights")
@click.option("--data", "path", required=True, help="Images to look at; labels are not used.")
@click.option("--images", type=click.IntRange(min=16), default=512, show_default=True, help="How many of them.")
@click.option("--which", type=click.Choice(["target", "context"]), default="target", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the images.")
@click.option("--layers/--no-layers", default=False, show_default=True, help="Also every block by itself.")
@click.option(
    "--views", type=click.IntRange(min=0), default=10, show_default=True, help="Of an image, for LiDAR; 0: none."
)
@heads_option
@debug_option
def diagnose(
    weights: str, path: str, images: int, which: Any, seed: int, layers: bool, views: int, heads: int | None
) -> None:
    """Diagnose an encoder without labels: rank, spread, what position explains, and a verdict.

    If WEIGHTS is a run, its curves are checked too, and what they show is listed under "warnings".
    """
    import json

    from ijepa.evaluation.diagnostics.by_layer import diagnose_fully as run
    from ijepa.evaluation.diagnostics.warnings import run_warnings
    from ijepa.interop.weights import resolve_weights

    resolved = resolve_weights(weights, heads=heads)
    found = run(
        resolved.encoder(which),
        open_images(path, "--data"),
        images=images,
        image_size=resolved.recipe.model.image_hw,
        seed=seed,
        rule=resolved.recipe.mask,
        views=views,
        layers=layers,
    )
    found["warnings"] = run_warnings(resolved.run) if resolved.run else []
    click.echo(json.dumps(found, indent=1))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", "path", default=None, help="Images for the pictures, where the run's own are elsewhere now.")
@debug_option
def report(run: Path, path: str | None) -> None:
    """Write RUN/report.html: one page with curves, pictures and tables, which needs no network."""
    from ijepa.release.archive import SUMS
    from ijepa.report.page import write_report

    if (run / SUMS).is_file():
        raise Refused(run, "is an archive, which a new page would change", "give the run it was made of")
    click.echo(f"report: {write_report(run, data=path)}")
